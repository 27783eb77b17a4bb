"""All checks of the graphs and engines that run one variant, shared by `build` and `verify`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from variator_export.core.errors import UserError
from variator_export.engines.base import Runner
from variator_export.verification.cases import REAL_TEXT
from variator_export.verification.invariances import check_invariances
from variator_export.verification.judging.expected import Expected
from variator_export.verification.judging.judge import QUANTIZATION_UNIT, REFERENCE, Finding
from variator_export.verification.reference_check import verify_graph


@dataclass(frozen=True)
class CheckedVariant:
    """Properties of a variant that the checks need besides its reference.

    Attributes:
        ratio: The ratio k.
        pad_token_id: The tokenizer's padding token.
        token_outputs: Names of the outputs with one row per token.
        max_length: The model's limit in tokens. None if there is none.
        padding_states_vary: Whether the hidden states of padding depend on the amount of padding.
        masking: The masking of the variant's plugin. None if it has none.
        quantized: Whether the graph is judged by what quantisation changes
            (`error_budget.quantization_share`).
    """

    ratio: int
    pad_token_id: int
    token_outputs: Sequence[str]
    max_length: int | None
    padding_states_vary: bool = False
    masking: str | None = None
    quantized: bool = False

    @property
    def reads_varying_padding(self) -> bool:
        """Whether the outputs depend on the amount of padding in eager PyTorch too."""
        return self.padding_states_vary and self.masking == "none"


@dataclass(frozen=True)
class LeftOut:
    """Part of a check that was left out.

    Attributes:
        graph: The graph or engine.
        check: The check's name.
        what: Cases or shapes that were left out, or the reason.
    """

    graph: str
    check: str
    what: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.graph}, {self.check}: {', '.join(self.what)}"


def check_variant(
    openers: Mapping[str, Callable[[], Runner]],
    reference: Sequence[Expected],
    subject: CheckedVariant,
    *,
    supports_shape: Callable[[str, int, int], bool] = lambda *_: True,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Finding], list[LeftOut]]:
    """Compare each graph or engine of a variant with its reference, and with itself in other batches.

    Args:
        openers: Functions that open each graph or engine, by file. They are called one after the other,
            because a session holds memory.
        reference: The cases and the expected outputs.
        subject: The variant.
        supports_shape: Function (file, batch_size, sequence_length) that returns whether a file accepts a
            shape. Engines accept only some shapes.
        progress: Called after each case of each file, and after the file's other checks.

    Returns:
        The findings; and the cases and shapes that were left out, because no profile of an engine covers them
        or because the property does not hold for the model itself.

    Raises:
        UserError: An engine accepts none of the cases.
    """
    real_text = next(expected for expected in reference if expected.case.name == REAL_TEXT)
    findings: list[Finding] = []
    left_out: list[LeftOut] = []
    for file, open_ in openers.items():
        taken = [expected for expected in reference if supports_shape(file, *expected.case.shape)]
        if not taken:
            raise UserError(
                f"None of the {len(reference)} cases is within the profiles of {file}.",
                "Verify with eager PyTorch and omit --quick to check the shapes of its profiles too; or "
                "compile it with a wider profile.",
            )
        if len(taken) < len(reference):
            # An engine does not run cases that none of its profiles covers; `run` refuses them too.
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
            reads_varying_padding=subject.reads_varying_padding,
            supports_shape=functools.partial(supports_shape, file),
        )
        findings += found
        left_out += [LeftOut(file, check, tuple(shapes)) for check, shapes in left_of.items()]
        progress()
    if subject.quantized:
        findings = [dataclasses.replace(finding, unit=QUANTIZATION_UNIT) for finding in findings]
    return findings, left_out
