"""Ctrl-C at a moment at which Python has nobody to tell."""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

from edgelora.cli.console import common_options
from edgelora.cli.interrupts import no_interrupt_lost


class Thing:
    """What a weak reference can refer to."""


class Dying:
    """Its end is the moment of Ctrl-C."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def in_a_callback_of_a_weak_reference() -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


def in_a_destructor() -> None:
    Dying()


@pytest.mark.parametrize("press", [in_a_callback_of_a_weak_reference, in_a_destructor])
def test_ctrl_c_that_python_drops_ends_a_command_all_the_same(press: Callable[[], None]) -> None:
    went_on = threading.Event()

    @click.command()
    @common_options
    def command(**_options: object) -> None:
        press()
        went_on.set()
        threading.Event().wait(30)

    result = CliRunner().invoke(command)
    assert went_on.is_set()
    assert result.exit_code == 130
    assert result.stderr == "interrupted; nothing half-written was left behind\n"


def test_other_errors_of_a_destructor_are_told_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    before = sys.unraisablehook

    class Failing:
        def __del__(self) -> None:
            raise ValueError

    with no_interrupt_lost():
        Failing()
    assert told == [ValueError]
    assert sys.unraisablehook is before
