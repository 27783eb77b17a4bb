"""`variator-export run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from variator_export.building.plan import parse_ratio
from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.core.errors import UsageError
from variator_export.engines.targets import TARGETS
from variator_export.sessions import Bundle


def run_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="TEXT", help="A text to run; may be repeated.")
    ] = None,
    ratio: Annotated[str | None, typer.Option(metavar="K", help="The ratio to run. Default: 1.")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variant to run, instead of --ratio.")
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="T", help=f"The target to run on: {', '.join(TARGETS.names())}.")
    ] = "onnxruntime",
    allow_unverified: options.AllowUnverifiedOption = False,
    trust_host_code: options.TrustHostCodeOption = False,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Truncate texts to the model's limit instead of refusing longer ones."
        ),
    ] = False,
    format: Annotated[
        Format, typer.Option(help="How to print the outputs; json contains every number.")
    ] = Format.TEXT,
) -> None:
    """Run texts through a bundle, without torch or transformers.

    **Examples**

    `variator-export run artifacts/minilm --ratio 4 --text "The ferry leaves at seven."`

    `variator-export run artifacts/minilm --ratio 4 --text "One." --text "Two." --format json`
    """
    printer = Output(format)
    if not text:
        raise UsageError(
            "There is no text to run.", f'variator-export run {bundle} --ratio 4 --text "The ferry leaves."'
        )
    if ratio is not None and variant is not None:
        raise UsageError("--ratio and --variant were both given.", "Give one of them.")
    choice: int | str = variant if variant is not None else parse_ratio(ratio or "1")
    loaded = Bundle.load(bundle)
    entry = loaded.variant(choice)
    session = loaded.session(
        target, entry.name, allow_unverified=allow_unverified, trust_host_code=trust_host_code
    )
    backbone = loaded.manifest.backbone
    inputs = loaded.text_encoder().encode(text, backbone.inputs, backbone.max_length, truncate=truncate)
    outputs = session.run(inputs)
    if entry.plugin is not None and not entry.plugin.trained:
        printer.hint(
            f"warning: the plugin of {entry.name} was only initialised; its outputs are meaningless."
        )
    # Only the tokens of each text, without the padding to the longest text.
    num_tokens = inputs["attention_mask"].sum(axis=1)
    rows = [
        {
            name: array[row, : num_tokens[row]] if name in backbone.token_outputs else array[row]
            for name, array in outputs.items()
        }
        for row in range(len(text))
    ]
    labels = loaded.labels()
    chosen = [_label(row["logits"], labels) if labels else {} for row in rows]
    if printer.is_json:
        results: list[dict[str, Any]] = [
            {"text": line, **label, "outputs": {name: _numbers(values) for name, values in row.items()}}
            for line, label, row in zip(text, chosen, rows, strict=True)
        ]
        printer.document({"variant": entry.name, "ratio": entry.ratio, "results": results})
        return
    table = Table(title=f"{entry.name} on {target}", title_justify="left")
    for name in ("text", "output", "shape", "first values"):
        table.add_column(name)
    for line, label, row in zip(text, chosen, rows, strict=True):
        if label.get("label") is not None:
            table.add_row(Text(_shown(line)), "label", "", Text(f"{label['label']} ({label['score']:.1%})"))
        for name, values in row.items():
            first = ", ".join(f"{value:.5f}" for value in values.ravel()[:4])
            ending = ", …" if values.size > 4 else ""
            table.add_row(Text(_shown(line)), name, "x".join(map(str, values.shape)), first + ending)
    printer.table(table)


def _label(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the predicted class of (C,) logits, with its softmax probability."""
    if not np.isfinite(logits).all():
        return {"label": None, "score": None}
    index = int(logits.argmax())
    powers = np.exp(logits.astype(np.float64) - float(logits[index]))
    return {"label": labels[index], "score": float(powers[index] / powers.sum())}


def _shown(text: str) -> str:
    """Return the start of a text, without characters that would move the cursor or change the colour."""
    return "".join(c if c.isprintable() else " " for c in text[:40])


def _numbers(values: np.ndarray) -> Any:
    """Return nested lists, with null for NaN and infinity, which JSON does not have."""
    if np.isfinite(values).all():
        return values.tolist()
    numbers = values.astype(object)
    numbers[~np.isfinite(values)] = None
    return numbers.tolist()
