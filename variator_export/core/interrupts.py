"""Ctrl-C that is not lost: libraries may swallow a KeyboardInterrupt or make an error of their own of it."""

import signal
from typing import Any

_seen = False


def install() -> None:
    """Remember Ctrl-C besides raising KeyboardInterrupt; where it is ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed since `install`."""
    return _seen


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that was swallowed."""
    if _seen:
        raise KeyboardInterrupt


def _remember(number: int, frame: Any) -> None:
    global _seen
    _seen = True
    signal.default_int_handler(number, frame)
