"""Errors with an exit code.

`UserError` and its subclasses are errors that the user can fix: the command line prints the message and the
hint, without a traceback. Any other exception is a bug in this package and keeps its traceback (exit code
70).
"""


class UserError(Exception):
    """The input or the machine does not allow the request.

    Args:
        message: The problem: which thing, what was found, what was expected.
        hint: The next step for the user, ideally a command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _shortened(message)
        self.hint = None if hint is None else _shortened(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


# Longest message in characters. A builder's own words may take pages; a hostile name takes megabytes.
_LONGEST = 6000


def _shortened(text: str) -> str:
    """A text without its middle if it is too long to be read."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters) … {text[-half:]}"


def first_line(error: Exception) -> str:
    """The first line of another library's error, whose message may run to pages."""
    return next(iter(str(error).strip().splitlines()), "no message")


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_code = 2


class NumbersDisagreeError(UserError):
    """An exported graph or engine does not compute what eager PyTorch computes."""

    exit_code = 3


class TooSlowError(UserError):
    """A speed-up is below the requested minimum."""

    exit_code = 4


EXIT_BUG = 70
EXIT_INTERRUPTED = 130
