"""What a dataset looks like to one base, in about 30 KB: moments, a sample, token counts.

No text is kept, apart from a description. Token counts and embeddings do tell which words occur:
the signature of a private dataset is private too.
"""

from __future__ import annotations

from edgelora.signature.moments import summarise
from edgelora.signature.record import Histogram, Signature, TextDistribution
from edgelora.signature.storage import from_bytes, to_bytes

__all__ = [
    "Histogram",
    "Signature",
    "TextDistribution",
    "from_bytes",
    "summarise",
    "to_bytes",
]
