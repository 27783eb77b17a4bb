"""`variator-export run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from variator_export.building.plan import parse_ratio
from variator_export.bundle.manifest import Variant
from variator_export.cli import generation_options, options, run_options
from variator_export.cli.output import Format, Output
from variator_export.cli.run.files import SUFFIXES, numbers, read_texts, write_results
from variator_export.cli.run.generation import run_generation
from variator_export.core.errors import UsageError
from variator_export.engines.batches import BATCH_SIZE
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TokenRow, token_row

_SHOWN_ENTITIES = 5


def run_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="TEXT", help="A text to run; may be repeated.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", metavar="TEXT", help="The second text of each --text, in the same order."),
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Texts from a file: .txt with one on each line, or .tsv, .csv or .jsonl; - reads lines from "
            "standard input.",
        ),
    ] = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    header: options.HeaderOption = True,
    ratio: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            help="The ratio to run. Default: the bundle's default variant, ratio 1 unless built otherwise.",
        ),
    ] = None,
    variant: run_options.VariantOption = None,
    target: run_options.RunTargetOption = "onnxruntime",
    allow_unverified: options.AllowUnverifiedOption = False,
    lean_runtime: options.LeanRuntimeOption = None,
    truncate: run_options.TruncateOption = True,
    prompt: options.PromptOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest number of texts to run at once.")
    ] = BATCH_SIZE,
    max_new_tokens: generation_options.MaxNewTokensOption = None,
    num_beams: generation_options.NumBeamsOption = None,
    generation: generation_options.GenerationOption = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--output-name",
            metavar="NAME",
            help="An output to show; may be repeated. Default: all.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Write the results to a file: {', '.join(SUFFIXES)}. .npy takes one output that "
            "has one row for each text.",
        ),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="How to print the outputs; json contains every number.")
    ] = Format.TEXT,
) -> None:
    """Run texts through a bundle, without torch or transformers.

    Prints labels, entities or answers, by the model's task, and the outputs. A model that generates text
    prints one text as it comes.

    **Examples**

    `variator-export run artifacts/minilm --ratio 4 --text "The ferry leaves at seven."`

    `variator-export run artifacts/minilm --ratio 4 --input texts.txt --output-name sentence_embedding
    --output vectors.npy`

    `variator-export run summariser --ratio 4 --input articles.txt --max-new-tokens 60 --num-beams 4`

    `variator-export run reranker --text "When does it leave?" --pair "The ferry leaves at seven."`
    """
    printer = Output(format)
    if ratio is not None and variant is not None:
        raise UsageError("--ratio and --variant were both given.", "Give one of them.")
    choice = variant if ratio is None else parse_ratio(ratio)
    first, second = _texts(bundle, text, pair, input, (text_column, pair_column, header))
    loaded = Bundle.load(bundle)
    entry = loaded.variant(loaded.manifest.default_variant if choice is None else choice)
    generates = loaded.manifest.backbone.generates
    settings = generation_options.parse_settings(generation, max_new_tokens, num_beams)
    if generates and (second is not None or only):
        raise UsageError(
            f"{bundle} generates text: it takes neither --pair nor --output-name.", "Leave them out."
        )
    if settings and not generates:
        raise UsageError(
            f"{bundle} does not generate text, so it has no {next(iter(settings))}.", "Leave it out."
        )
    names = () if generates else _outputs(loaded, only, output)
    session = loaded.session(target, entry.name, allow_unverified=allow_unverified, lean_runtime=lean_runtime)
    if generates:
        generator = loaded.text_to_text(entry.name, session=session)
        rows = generator.encoder.token_rows(first, truncate=truncate, prompt_name=prompt)
        _warn(printer, rows, generator.encoder.max_length, entry)
        run_generation(
            printer,
            generator,
            rows,
            first,
            settings=settings,
            batch_size=batch_size,
            output=output,
            about={"variant": entry.name, "ratio": entry.ratio, "target": target},
        )
        return
    model = loaded.text_model(entry.name, session=session)
    encodings = model.encode(first, second, truncate=truncate, prompt_name=prompt)
    rows = [token_row(encoding) for encoding in encodings]
    _warn(printer, rows, model.encoder.max_length, entry)
    found = model.outputs(rows, batch_size)
    predicts = model.no_predictions(pairs=second is not None) is None
    predictions = model.predictions(encodings, found, first, second) if predicts else [None] * len(first)
    results: list[dict[str, Any]] = [
        {
            "text": line,
            **({"pair": second[index]} if second is not None else {}),
            **_prediction(predictions[index]),
            "outputs": {name: values for name, values in found[index].items() if name in names},
        }
        for index, line in enumerate(first)
    ]
    if output is not None:
        write_results(output, results)
        printer.hint(f"written: {output}")
    if printer.is_json:
        shown = [result | {"outputs": numbers(result["outputs"])} for result in results]
        printer.document({"variant": entry.name, "ratio": entry.ratio, "results": shown})
    elif output is None:
        printer.table(_table(f"{entry.name} on {target}", results))


def _warn(printer: Output, rows: Sequence[TokenRow], limit: int | None, variant: Variant) -> None:
    """Say what makes the results other than expected."""
    if cut := sum(row.truncated for row in rows):
        printer.hint(f"{cut} of {len(rows)} texts were truncated to the model's limit of {limit} tokens.")
    if variant.plugin is not None and not variant.plugin.trained:
        printer.hint(
            f"warning: the plugin of {variant.name} was only initialised; its outputs are meaningless."
        )


def _texts(
    bundle: Path,
    text: list[str] | None,
    pair: list[str] | None,
    input: str | None,
    columns: tuple[str, str | None, bool],
) -> tuple[list[str], list[str] | None]:
    if input is not None and (text or pair):
        raise UsageError("--input and --text were both given.", "Give one of them.")
    if input is not None:
        return read_texts(input, *columns)
    if not text:
        raise UsageError(
            "There is no text to run.", f'variator-export run {bundle} --ratio 4 --text "The ferry leaves."'
        )
    if pair and len(pair) != len(text):
        raise UsageError(
            f"{len(text)} --text and {len(pair)} --pair were given.", "Give one --pair for each --text."
        )
    return text, pair or None


def _outputs(bundle: Bundle, only: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The outputs to show."""
    backbone = bundle.manifest.backbone
    for name in only or ():
        options.choose("--output-name", name, backbone.outputs)
    names = tuple(only or backbone.outputs)
    if file is not None and file.suffix not in SUFFIXES:
        raise UsageError(
            f"{file} has the suffix {file.suffix or '(none)'}.", f"Give one of: {', '.join(SUFFIXES)}."
        )
    if file is not None and file.suffix == ".npy":
        per_text = [name for name in names if name not in backbone.token_outputs]
        if len(per_text) != 1:
            raise UsageError(
                f".npy takes one output with a row for each text; there are {', '.join(per_text) or 'none'}.",
                "Choose one with --output-name, or write .jsonl or .parquet.",
            )
        names = (per_text[0],)
    return names


def _prediction(found: Any) -> dict[str, Any]:
    """A prediction as a part of a result: a label's fields by themselves, a list under its name."""
    if found is None:
        return {}
    return {"predictions": found} if isinstance(found, list) else dict(found)


def _table(title: str, results: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("text", "output", "shape", "first values"):
        table.add_column(name)
    for result in results:
        line = result["text"] + (f" | {result['pair']}" if "pair" in result else "")
        for kind, words in _in_words(result):
            table.add_row(Text(_shown(line)), kind, "", Text(words))
        for name, values in result["outputs"].items():
            first = ", ".join(f"{value:.5f}" for value in values.ravel()[:4])
            ending = ", …" if values.size > 4 else ""
            table.add_row(Text(_shown(line)), name, "x".join(map(str, values.shape)), first + ending)
    return table


def _in_words(result: dict[str, Any]) -> list[tuple[str, str]]:
    """A result's prediction as rows of the table: the kind and the words."""
    if result.get("label") is not None:
        return [("label", f"{result['label']} ({result['score']:.1%})")]
    if "answer" in result:
        return [("answer", f"{_shown(result['answer'])} ({result['score']:.1%})")]
    rows = []
    for item in result.get("predictions", [])[:_SHOWN_ENTITIES]:
        if isinstance(item, list):  # the tokens for one mask
            rows.append(("mask", ", ".join(f"{_shown(t['token_str'])} ({t['score']:.1%})" for t in item)))
        else:
            rows.append((item["entity_group"], f"{_shown(item['word'])} ({item['score']:.1%})"))
    return rows


def _shown(text: str) -> str:
    """Return the start of a text, without characters that would move the cursor or change the colour."""
    return "".join(c if c.isprintable() else " " for c in text[:40])
