"""All that is asked of what runs one variant: the one way to verify, for `build` and for `verify`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from variator_export.core.errors import UserError
from variator_export.engines.base import Runner
from variator_export.verification.cases import REAL_TEXT
from variator_export.verification.invariances import check_invariances
from variator_export.verification.judge import REFERENCE, Finding, verify_graph
from variator_export.verification.reference import Expected


@dataclass(frozen=True)
class Subject:
    """What is known of a variant besides its reference.

    Attributes:
        ratio: k.
        pad_token_id: Of the tokenizer.
        token_outputs: Outputs with one row per token.
        max_length: The model's limit in tokens; None: there is none.
    """

    ratio: int
    pad_token_id: int
    token_outputs: Sequence[str]
    max_length: int | None


@dataclass(frozen=True)
class LeftOut:
    """What was not looked at.

    Attributes:
        graph: The engine that is not for it.
        check: Of which check.
        what: Cases or shapes, or the reason.
    """

    graph: str
    check: str
    what: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.graph}, {self.check}: {', '.join(self.what)}"


def check_variant(
    openers: Mapping[str, Callable[[], Runner]],
    reference: Sequence[Expected],
    subject: Subject,
    *,
    takes: Callable[[str, int, int], bool] = lambda *_: True,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Finding], list[LeftOut]]:
    """Compare each graph or engine of a variant with its reference, and with itself in other surroundings.

    Args:
        openers: What opens each, by its file; one after the other, since a session holds memory.
        reference: The cases and what is expected.
        subject: The variant.
        takes: Whether a file is for a shape (file, batch_size, sequence_length); engines are for some only.
        progress: Called after each case of each file, and after its other checks.

    Returns:
        The findings, and what was left out because an engine's profiles are not for it.

    Raises:
        UserError: An engine is for none of the cases.
    """
    real_text = next(expected for expected in reference if expected.case.name == REAL_TEXT)
    findings: list[Finding] = []
    left_out: list[LeftOut] = []
    for file, open_ in openers.items():
        taken = [expected for expected in reference if takes(file, *expected.case.shape)]
        if not taken:
            raise UserError(
                f"None of the {len(reference)} cases is within the profiles of {file}.",
                "Verify with eager PyTorch and without --quick, so that its profiles' own shapes are "
                "looked at; or compile it with a wider profile.",
            )
        if len(taken) < len(reference):
            # What an engine has no profile for it is not asked to run; `run` refuses that too.
            ran = {expected.case.name for expected in taken}
            names = [expected.case.name for expected in reference]
            left_out.append(LeftOut(file, REFERENCE, tuple(name for name in names if name not in ran)))
        runner = open_()
        findings += verify_graph(file, runner, taken, progress)
        found, left_of = check_invariances(
            file,
            runner,
            real_text,
            ratio=subject.ratio,
            pad_token_id=subject.pad_token_id,
            token_outputs=subject.token_outputs,
            max_length=subject.max_length,
            takes=functools.partial(takes, file),
        )
        findings += found
        left_out += [LeftOut(file, check, tuple(shapes)) for check, shapes in left_of.items()]
        progress()
    return findings, left_out
