"""Ctrl-C and SIGTERM, noted, so that training can stop between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Signals:
    """The signal that has come, if any."""

    received: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Be the handler of a signal. Ctrl-C once more does not wait."""
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextlib.contextmanager
def noted(wanted: bool = True) -> Iterator[Signals]:
    """Note signals while the context is open, unless something else has been made of them."""
    signals, before = Signals(), {}
    if wanted and threading.current_thread() is threading.main_thread():
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {n: handler for n, handler in usual.items() if signal.getsignal(n) is handler}
    try:
        for number in before:
            signal.signal(number, signals.note)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
