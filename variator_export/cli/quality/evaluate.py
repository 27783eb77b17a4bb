"""`variator-export evaluate`."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from variator_export.building.evaluate import evaluate
from variator_export.bundle.manifest import is_bundle
from variator_export.bundle.quality_report import between
from variator_export.cli import generation_options, options
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.core.errors import UsageError
from variator_export.model.source import folder_of
from variator_export.quality.evaluation import Quality, QualityRow, store_quality
from variator_export.quality.tasks import TASKS

_RUNTIMES = ("both", "eager", "onnxruntime")


def evaluate_command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE_OR_PLUGIN...", help="One bundle, or folders of plugins and of modules."
        ),
    ],
    data: options.DataOption,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the label, score, tags or answers: its name, or with --no-header its number from "
            "1.",
        ),
    ] = None,
    label_map: options.LabelMapOption = None,
    header: options.HeaderOption = True,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="What to measure: classification, multi-label, regression, token-classification, "
            "question-answering, fill-mask, text2text-generation (ROUGE-L), similarity (Spearman correlation "
            "of pairs), embedding or hidden-states. Default: the first of them that model and data allow.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="SRC", help="The backbone. Default: the backbone that the bundle or plugin names."
        ),
    ] = None,
    architecture: options.ArchitectureOption = None,
    label_word: options.LabelWordOption = None,
    decoder_prompt: options.DecoderPromptOption = None,
    runtime: Annotated[
        str, typer.Option(metavar="R", help="eager, onnxruntime, or both (their outputs must then agree).")
    ] = "both",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=3, metavar="N", help="Truncate longer texts to N tokens. Default: the model's limit."
        ),
    ] = None,
    prompt: options.PromptOption = None,
    max_new_tokens: generation_options.MaxNewTokensOption = None,
    num_beams: generation_options.NumBeamsOption = None,
    generation: generation_options.GenerationOption = None,
    assembly: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="An assembly of the given modules, such as enc=2,2,1x8; may be repeated. Default: for each "
            "folder, one with all of its modules.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the bundle that plugin folders are exported to. `build --output DIR` goes on from it "
            "and traces nothing again.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the result into the model cards of the plugin folders.")
    ] = False,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Measure the quality of every ratio against the uncompressed backbone.

    Plugin folders are exported first, so that the measured model is the one that would be deployed.

    **Examples**

    `variator-export evaluate artifacts/minilm --data sts.tsv --text-column a --pair-column b --label-column
    score`

    `variator-export evaluate sst2-plugins/ratio-4 --backbone ./sst2 --data dev.tsv --text-column sentence
    --label-column label`

    `variator-export evaluate modules/g2 modules/g3 --assembly enc=2x3 --assembly enc=3,1x3 --data sts.tsv
    --text-column a --pair-column b --label-column score`

    `variator-export evaluate artifacts/minilm --data queries.jsonl --runtime onnxruntime` needs no torch.

    `variator-export evaluate artifacts/flan --data dev.tsv --text-column article --label-column summary
    --max-new-tokens 60`
    """
    options.choose("--runtime", runtime, _RUNTIMES)
    folders = [folder_of(path) for path in paths]
    if (label_word or decoder_prompt) and is_bundle(folders[0]):
        raise UsageError("A bundle has its own label words.", "Leave out --label-word and --decoder-prompt.")
    if task is not None:
        options.choose("--task", task, TASKS.names())
    configs = ("plugin_config.json", "module_config.json")
    if card and not all(any((path / name).is_file() for name in configs) for path in folders):
        raise UsageError(
            "--card writes into folders of plugins and modules; a bundle has no model cards.",
            "Leave --card out.",
        )
    from variator_export.data.example_files import read_examples
    from variator_export.data.examples import Columns
    from variator_export.model.card import check_card, write_quality

    if card:
        for path in folders:
            check_card(path)
    names = options.parse_label_map(label_map)
    settings = generation_options.parse_settings(generation, max_new_tokens, num_beams)
    examples = read_examples(data, Columns(text_column, pair_column, label_column, header)).relabelled(names)
    printer = Output(format)
    with ConsoleProgress(printer) as progress:
        quality = evaluate(
            folders,
            examples,
            task=task,
            backbone=backbone,
            architecture=architecture,
            label_words=options.parse_label_words(label_word),
            decoder_prompt=decoder_prompt or "",
            runtimes=cast(Any, ("eager", "onnxruntime") if runtime == "both" else (runtime,)),
            max_tokens=max_tokens,
            prompt_name=prompt,
            generation=settings,
            assemblies=assembly or (),
            output=output,
            progress=progress,
        )
    if card:
        markdown = quality_markdown(quality)
        for path in folders:
            write_quality(path, markdown)
    if printer.is_json:
        printer.document(quality.as_dict())
    else:
        _print(printer, quality)
    if (bundle := folders[0] if is_bundle(folders[0]) else output) is not None:
        # After printing, so that a bundle that cannot be written to costs no results.
        store_quality(bundle, quality)
    elif not printer.is_json:
        printer.hint("The exported bundle was discarded; --output DIR keeps it for `build --output DIR`.")


def _print(printer: Output, quality: Quality) -> None:
    printer.table(_table(quality))
    for warning in quality.warnings:
        printer.hint(f"warning: {warning}")
    if quality.data["truncated"]:
        printer.hint(f"{quality.data['truncated']} texts were longer than the limit and were truncated.")
    for variant, deviation in quality.agreement.items():
        if (same := deviation.get("same_texts")) is not None:
            printer.hint(f"{variant}: {same:.1%} of the texts are those of eager PyTorch")
            continue
        error = deviation["relative_frobenius"]
        printer.hint(
            f"{variant}: the exported graph agrees with eager PyTorch: relative Frobenius error {error:.1e}"
            if quality.exact
            else f"{variant}: the quantised graph differs from eager PyTorch in float32 by {error:.1%} "
            "(relative Frobenius error)"
        )


def _table(quality: Quality) -> Table:
    table = Table(title=f"{_title(quality)}; in brackets 95 % intervals", title_justify="left")
    for name in ("variant", "runtime"):
        table.add_column(name)
    for name in _columns(quality):
        table.add_column(name, justify="right")
    for row in quality.rows:
        table.add_row(row.variant, row.runtime, *_cells(row, quality))
    return table


def _title(quality: Quality) -> str:
    return f"{quality.task} on {quality.data['name']} ({quality.data['examples']} examples)"


def quality_markdown(quality: Quality) -> str:
    """The exported graphs' rows as a Markdown table."""
    data = quality.data
    runtime = quality.rows[-1].runtime
    lines = [
        f"{quality.task.capitalize()} on `{data['name']}` ({data['examples']} examples, sha256 "
        f"`{data['sha256'][:16]}…`), on {runtime}; `lost` is the relative loss in {quality.metric}, in "
        "brackets its 95 % interval from resampling the examples.",
        "",
        "| variant | " + " | ".join(_columns(quality)) + " |",
        "|---|" + "---:|" * len(_columns(quality)),
    ]
    lines += [
        f"| {row.variant} | " + " | ".join(_cells(row, quality)) + " |"
        for row in quality.rows
        if row.runtime == runtime
    ]
    lines += [f"\nWarning: {warning}" for warning in quality.warnings]
    return "\n".join(lines)


def _columns(quality: Quality) -> list[str]:
    """The main metric comes first."""
    others = [name for name in quality.rows[0].metrics if name != quality.metric]
    return [quality.metric, *others, "lost"]


def _cells(row: QualityRow, quality: Quality) -> list[str]:
    cells = []
    for name in _columns(quality)[:-1]:
        value = row.metrics[name]
        within = row.interval if name == quality.metric else None
        cells.append("" if value is None else f"{value:.4f}{between(within, '.4f')}")
    lost = row.relative_loss
    return [*cells, "" if lost is None else f"{lost:.2%}{between(row.loss_interval, '.2%')}"]
