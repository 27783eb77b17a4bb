"""`variator-export run` for models that generate text."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from variator_export.cli.output import Output
from variator_export.cli.run.files import write_results
from variator_export.core.errors import UsageError
from variator_export.text.tokenizer import TokenRow
from variator_export.text_to_text import TextToText


def run_generation(
    printer: Output,
    model: TextToText,
    rows: Sequence[TokenRow],
    texts: Sequence[str],
    *,
    settings: dict[str, Any],
    batch_size: int,
    output: Path | None,
    about: dict[str, Any],
) -> None:
    """Generate a text for each row, and print it as it comes, or all in a table or a document.

    Args:
        printer: The printer of the command.
        model: The model.
        rows: The tokens of each text.
        texts: The texts.
        settings: Settings of the generation.
        batch_size: The largest number of texts to run at once.
        output: The file to write to. None to print.
        about: What the JSON document says about the run.
    """
    if output is not None and output.suffix == ".npy":
        raise UsageError(".npy holds numbers, not text.", "Write .jsonl or .parquet.")
    streams = model.session.settings.changed(settings).num_beams == 1 and len(rows) == 1
    if output is None and not printer.is_json and streams:
        for piece in model.stream(rows[0], **settings):
            sys.stdout.write(_printable(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    found = model.generate(rows, batch_size, **settings)
    several = settings.get("num_return_sequences") is not None
    results: list[dict[str, Any]] = [
        {"text": text, "generated": generated if several else generated[0]}
        for text, generated in zip(texts, found, strict=True)
    ]
    if output is not None:
        write_results(output, [result | {"outputs": {}} for result in results])
        printer.hint(f"written: {output}")
    if printer.is_json:
        printer.document(about | {"results": results})
    elif output is None:
        table = Table(title=f"{about['variant']} on {about['target']}", title_justify="left")
        table.add_column("text", max_width=40, no_wrap=True)
        table.add_column("generated")
        for text, generated in zip(texts, found, strict=True):
            for index, line in enumerate(generated):
                table.add_row(Text(_printable(text) if index == 0 else ""), Text(_printable(line)))
        printer.table(table)


def _printable(text: str) -> str:
    """A text without characters that would move the cursor or change the colour."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
