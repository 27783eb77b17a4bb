"""Options that several commands share, and functions that parse and check their values."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from variator_export.core.environment import require
from variator_export.core.errors import UsageError
from variator_export.core.nearest import nearest
from variator_export.core.shares import parse_share
from variator_export.core.validation import describe_validation_error
from variator_export.recipe.recipe import DEFAULT_RECIPE
from variator_export.recipe.recipe_file import load_recipe

# The fields of training.settings.Losses, which is not imported here because --help does not need it.
LOSS_TERMS = ("hidden", "layers", "embedding", "decoder", "logits", "label")
# Those of training.modular.settings.ModuleLosses that plain text has.
MODULE_LOSS_TERMS = (*LOSS_TERMS, "attention")

_SHAPE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


def _share(value: float) -> float:
    if not 0 < value <= 0.5:
        raise UsageError(f"--held-out {value:g} is not above 0 and at most 0.5.", "--held-out 0.05")
    return value


BackboneOption = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="SRC",
        help="The model: a folder, ORGANISATION/NAME[@REVISION] on the hub, package:DISTRIBUTION/PATH, or "
        "recipes:PATH. Default: the default recipe's backbone.",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="T",
        help="The model's task, as Optimum names it: feature-extraction, text-classification, "
        "token-classification, question-answering, fill-mask. Default: the task in its config.json.",
    ),
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(
        "--architecture",
        metavar="CLASS",
        help="The class of transformers to load, for example T5EncoderModel, instead of --task.",
    ),
]
LabelWordOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-word",
        metavar="[LABEL=]WORD",
        help="The word that stands for a label, a single token of the model. The scores of these words make "
        "a classifier of a model that generates text. Repeat for each label.",
    ),
]
DecoderPromptOption = Annotated[
    str | None,
    typer.Option(
        "--decoder-prompt",
        metavar="TEXT",
        help="What the decoder reads before the label word: '<extra_id_0>' in the paper's T5.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="NAME",
        help="The model's prompt to put before each text, by name. Default: the model's default prompt.",
    ),
]
PluginsOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="[NAME=]DIR", help="A plugin to train further; may be repeated."),
]
OnlyRatiosOption = Annotated[
    list[str] | None, typer.Option("--ratio", metavar="K", help="Only this ratio; may be repeated.")
]
OnlyVariantsOption = Annotated[
    list[str] | None, typer.Option("--variant", metavar="NAME", help="Only this variant; may be repeated.")
]
AllowUnverifiedOption = Annotated[
    bool,
    typer.Option("--allow-unverified", help="Run an engine that was built but never verified on a GPU."),
]
LeanRuntimeOption = Annotated[
    Path | None,
    typer.Option(
        "--lean-runtime",
        metavar="LIBRARY",
        help="TensorRT's lean runtime (libnvinfer_lean.so) of the version that built the engine, for a later "
        "TensorRT.",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write to.")]
TextsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="SRC[@SHARE]",
        help="Plain text: .txt, .jsonl, a folder, or datasets:NAME, with the share of passages to draw from "
        "it; may be repeated.",
    ),
]
TextFieldOption = Annotated[
    str,
    typer.Option(
        "--text-field", metavar="NAME", help="Field or column of the text in .jsonl files and data sets."
    ),
]
HeldOutPassagesOption = Annotated[
    int,
    typer.Option(
        "--held-out-passages", metavar="N", help="Passages of the held-out text to measure the loss on."
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Number of optimizer steps.")
]
BatchOption = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Texts per step, over all processes.")
]
RateOption = Annotated[float | None, typer.Option("--learning-rate", metavar="X", help="Peak learning rate.")]
ScheduleOption = Annotated[
    str | None, typer.Option("--schedule", metavar="S", help="Learning rate schedule: linear or constant.")
]
WarmupOption = Annotated[
    int, typer.Option("--warmup-steps", min=0, metavar="N", help="Steps over which the learning rate rises.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="Random seed.")]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="P",
        help="Precision of matrix products: float32, bfloat16, or auto (bfloat16 if the hardware computes in "
        "it).",
    ),
]
EvalOption = Annotated[
    int,
    typer.Option(
        "--eval-every",
        min=1,
        metavar="N",
        help="Steps between evaluations on the held-out data. Each one also writes a checkpoint.",
    ),
]
PatienceOption = Annotated[
    int | None,
    typer.Option(
        "--patience", min=1, metavar="N", help="Stop after N evaluations in a row without a better loss."
    ),
]
LossOption = Annotated[
    list[str] | None,
    typer.Option(
        "--loss", metavar="TERM=WEIGHT", help=f"A term of the loss: {', '.join(LOSS_TERMS)}; may be repeated."
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="T", help="Data type of the plugin files: float16 or float32.")
]
TermsOption = Annotated[
    str | None,
    typer.Option("--terms", metavar="TEXT", help="Terms of use of the data, for the model card."),
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace the output of an earlier run.")]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")
]
HeldOutOption = Annotated[
    float,
    typer.Option(
        "--held-out", callback=_share, metavar="X", help="Share of the data held out to measure the loss."
    ),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=3, metavar="N", help="Truncate longer texts to N tokens.")
]

DataOption = Annotated[
    str,
    typer.Option(
        "--data", metavar="SRC", help="A .tsv, .csv, .jsonl or .conll file, or datasets:NAME,CONFIG,SPLIT."
    ),
]
ValidationOption = Annotated[
    str | None,
    typer.Option(
        "--validation", metavar="SRC", help="A separate file to measure the loss on, instead of --held-out."
    ),
]
TextColumnOption = Annotated[
    str,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Column of the text: its name, or with --no-header its number from 1.",
    ),
]
PairColumnOption = Annotated[
    str | None,
    typer.Option("--pair-column", metavar="NAME", help="Column of the second text, if the data has pairs."),
]
LabelMapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-map",
        metavar="DATA=MODEL",
        help="A label in the data and the model's name for it, for example 1=positive; may be repeated.",
    ),
]
HeaderOption = Annotated[
    bool,
    typer.Option(
        "--header/--no-header", help="Whether the first line of a .tsv or .csv file names the columns."
    ),
]

Model = TypeVar("Model", bound=BaseModel)


def parse_label_words(given: Sequence[str] | None) -> dict[str, str] | None:
    """The word of each label from values of `--label-word`, None without any; a word alone is its own label.

    Raises:
        UsageError: A label or a word is empty, or a label was given twice.
    """
    words: dict[str, str] = {}
    for text in given or ():
        label, equals, word = text.partition("=")
        word = word if equals else label
        if not label or not word:
            raise UsageError(f"--label-word {text!r} is not [LABEL=]WORD.", "--label-word positive")
        if label in words:
            raise UsageError(f"--label-word {label} was given twice.", "Give each label once.")
        words[label] = word
    return words or None


def check_architecture(task: str | None, architecture: str | None) -> None:
    """Refuse a task and an architecture together.

    Raises:
        UsageError: Both were given.
    """
    if task is not None and architecture is not None:
        raise UsageError("--task and --architecture were both given.", "Give one of them.")


def require_training() -> None:
    """Raise a `UserError` unless everything needed for training is installed."""
    for module in ("torch", "transformers"):
        require(module, "export", "Training")
    for module in ("accelerate", "matplotlib"):
        require(module, "train", "Training")


def default_backbone() -> str:
    """Return the source of the default recipe's backbone."""
    return load_recipe(DEFAULT_RECIPE).backbone.source


def command_line() -> str:
    """Return the command line as the user typed it."""
    return shlex.join(["variator-export", *sys.argv[1:]])


def checked(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Create validated settings from the values of options.

    Raises:
        UsageError: A value is invalid. The message names the option.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        words = describe_validation_error(error, model)
        options = re.sub(r"'([a-z_]+)'(?= is )", lambda match: "--" + match[1].replace("_", "-"), words)
        raise UsageError(
            f"The options are invalid: {options}", "Correct the named option; --help lists all options."
        ) from error


def parse_losses(texts: list[str] | None, terms: Sequence[str] = LOSS_TERMS) -> dict[str, float]:
    """Parse `--loss TERM=WEIGHT` into weights by term. Terms that are not named are left out.

    Raises:
        UsageError: A term is unknown or repeated, or a weight is not a number.
    """
    weights: dict[str, float] = {}
    for text in texts or ():
        term, separator, weight = text.partition("=")
        if term not in terms:
            guess = nearest(term, list(terms))
            raise UsageError(
                f"There is no loss term {term!r}; the terms are {', '.join(terms)}.",
                f"--loss {guess or 'hidden'}=1",
            )
        if term in weights:
            raise UsageError(f"The loss term {term} was given twice.", "Give it once.")
        try:
            weights[term] = float(weight) if separator else 1.0
        except ValueError:
            raise UsageError(f"The weight of --loss {text} is not a number.", f"--loss {term}=1") from None
    return weights


def parse_shape(text: str) -> tuple[int, int]:
    """Parse `--shape BxS` into the batch size and the sequence length.

    Raises:
        UsageError: The text is not a shape.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--shape {text!r} is not a shape.", "Give rows x tokens, for example --shape 8x128."
        )
    return int(match[1]), int(match[2])


def parse_label_map(texts: list[str] | None) -> dict[str, str]:
    """Parse `--label-map DATA=MODEL` into the model's labels by the labels in the data.

    Raises:
        UsageError: A value has no `=`, or a label was given twice.
    """
    names: dict[str, str] = {}
    for text in texts or ():
        label, separator, name = text.rpartition("=")
        if not separator or not label or not name:
            raise UsageError(
                f"--label-map {text!r} is not a label in the data and one of the model, with = between them.",
                "For example: --label-map 1=positive",
            )
        if label in names:
            raise UsageError(f"--label-map has the label {label!r} twice.", "Give it once.")
        names[label] = name
    return names


def named_plugin(text: str) -> tuple[str | None, str]:
    """Split `[NAME=]DIR` into name and source. An existing folder may have a `=` in its own name."""
    name, separator, folder = text.partition("=")
    return (name, folder) if separator and not Path(text).exists() else (None, text)


def choose(option: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the value of an option if it is one of the choices.

    Raises:
        UsageError: The value is not one of the choices.
    """
    if value not in choices:
        guess = nearest(value, list(choices))
        hint = f"Did you mean {option} {guess}?" if guess else f"Choose one of: {', '.join(choices)}."
        raise UsageError(f"{option} {value!r} is not one of {', '.join(choices)}.", hint)
    return value


def parse_loss(text: str) -> float:
    """Parse the value of --max-loss, `1%` or `0.01`.

    Raises:
        UsageError: The value is not a share.
    """
    try:
        return parse_share(text)
    except ValueError as error:
        raise UsageError(f"--max-loss {error}.", "For example: --max-loss 1%") from error
