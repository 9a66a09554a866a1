"""Ctrl-C that Python drops comes again."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_AGAIN_S = 0.02


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Within the block a KeyboardInterrupt that Python prints and forgets is raised again.

    Python raises it wherever the main thread is. In a callback of a weak reference, a `__del__` or
    a callback of ctypes nothing can receive it: it would be "ignored", and the command go on.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Raised here it would be dropped too; a `Thread` takes locks that may be held here.
            _thread.start_new_thread(_interrupt_soon, ())
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _interrupt_soon() -> None:
    time.sleep(_AGAIN_S)
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGINT)  # it ends a wait for a lock too
    else:
        _thread.interrupt_main()
