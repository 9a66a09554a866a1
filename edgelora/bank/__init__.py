"""A folder of converted adapters with their signatures, and an index that is only a cache."""

from __future__ import annotations

from edgelora.bank.opening import open_bank
from edgelora.bank.records import BankRecord, Facts
from edgelora.bank.store import Added, AlreadyThere, Bank

__all__ = ["Added", "AlreadyThere", "Bank", "BankRecord", "Facts", "open_bank"]
