"""Errors with an exit code.

`UserError` and its children are the user's to mend: the command line prints the message and the hint,
without a traceback. Everything else is a bug of ours and keeps its traceback (exit code 70).
"""


class UserError(Exception):
    """The input or the machine does not allow what was asked for.

    Args:
        message: What is wrong: which thing, what was found, what was expected.
        hint: What to do next, ideally a command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def first_line(error: Exception) -> str:
    """Of what another library raised: its words may be pages."""
    return next(iter(str(error).strip().splitlines()), "no message")


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_code = 2


class NumbersDisagreeError(UserError):
    """An exported graph or engine does not compute what eager PyTorch computes."""

    exit_code = 3


class TooSlowError(UserError):
    """A speed-up is below what was asked for."""

    exit_code = 4


EXIT_BUG = 70
EXIT_INTERRUPTED = 130
