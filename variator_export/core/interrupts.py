"""Reliable Ctrl-C: libraries may swallow a KeyboardInterrupt or turn it into an error of their own."""

import signal
from typing import Any

_seen = False


def install() -> None:
    """Remember Ctrl-C and raise KeyboardInterrupt; a process that ignores SIGINT keeps ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed after `install`."""
    return _seen


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed, in case a library swallowed the first one."""
    if _seen:
        raise KeyboardInterrupt


def _remember(number: int, frame: Any) -> None:
    global _seen
    _seen = True
    signal.default_int_handler(number, frame)
