"""Log of TensorRT's errors, kept for messages. TensorRT's own logger would write to standard output."""

from typing import Any

_LAST = 8


def make_log(trt: Any) -> Any:
    """Create a logger that keeps errors and warnings in `messages`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append(message)

    return Log()


def last_messages(log: Any, detail: str = "") -> str:
    """The last messages of a log, one per line.

    Args:
        log: A log from `make_log`.
        detail: A further explanation, put before the messages.
    """
    return "\n  ".join([*([detail] if detail else []), *log.messages[-_LAST:]]) or "it gave no reason"
