"""What TensorRT says of errors: kept for our messages. Its own logger would write into standard output."""

from typing import Any

_LAST = 8


def make_log(trt: Any) -> Any:
    """A logger that keeps errors and warnings in `messages`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append(message)

    return Log()


def last_words(log: Any, detail: str = "") -> str:
    """The last of its messages, each on a line.

    Args:
        log: What `make_log` gave.
        detail: What is known besides; comes first.
    """
    return "\n  ".join([*([detail] if detail else []), *log.messages[-_LAST:]]) or "it gave no reason"
