"""`variator-export embed`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from variator_export.building.plan import parse_ratio
from variator_export.cli import options, run_options
from variator_export.cli.output import Format, Output
from variator_export.cli.serving.embed_progress import ConsoleEmbedProgress
from variator_export.core.errors import UsageError, UserError
from variator_export.engines.batches import BATCH_SIZE
from variator_export.serving.offline.formats import FORMATS
from variator_export.serving.offline.progress import EmbedProgress
from variator_export.serving.offline.run import embed_file
from variator_export.serving.offline.settings import CHUNK_SIZE, EmbedSettings
from variator_export.serving.offline.source import SUFFIXES, TextSource
from variator_export.serving.offline.unfinished import parts_folder
from variator_export.sessions import Bundle


def embed_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    input: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help=f"The texts: {', '.join(SUFFIXES)}. A .txt file has one on each line; - reads lines from "
            "standard input.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FILE",
            help=f"The file to write: {', '.join(FORMATS)}.",
        ),
    ],
    text_column: options.TextColumnOption = "text",
    id_column: Annotated[
        str | None,
        typer.Option(
            "--id-column",
            metavar="NAME",
            help="Column of an id to copy to the output. Default: the number of the text, from 0.",
        ),
    ] = None,
    header: options.HeaderOption = True,
    ratio: Annotated[
        str | None,
        typer.Option(metavar="K", help="The ratio to run. Default: 1, the backbone without plugins."),
    ] = None,
    variant: run_options.VariantOption = None,
    target: run_options.RunTargetOption = "onnxruntime",
    allow_unverified: options.AllowUnverifiedOption = False,
    lean_runtime: options.LeanRuntimeOption = None,
    prompt: options.PromptOption = None,
    truncate: run_options.TruncateOption = True,
    normalize: Annotated[
        bool,
        typer.Option("--normalize", help="Scale vectors to length 1, where the model does not do so itself."),
    ] = False,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Repeat the texts in the output (.jsonl, .parquet).")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest number of texts to run at once.")
    ] = BATCH_SIZE,
    chunk_size: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Texts of a chunk, the most that a kill loses per process."),
    ] = CHUNK_SIZE,
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes, each with a session of its own.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Threads of each process. Default: its share of OMP_NUM_THREADS, or of the cores.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing output.")] = False,
    restart: options.RestartOption = False,
    format: Annotated[Format, typer.Option(help="How to print what was done.")] = Format.TEXT,
) -> None:
    """Write the sentence embeddings of a file of any length, resumable, in constant memory.

    After a kill, the same command goes on from what is finished and writes the same bytes. Needs neither
    torch nor transformers.

    **Examples**

    `variator-export embed artifacts/minilm --input texts.jsonl --id-column id --output vectors.parquet`

    `variator-export embed artifacts/minilm --input texts.txt --output vectors.npy --processes 4`

    `zcat texts.gz | variator-export embed artifacts/minilm --input - --output vectors.npy`
    """
    printer = Output(format)
    if ratio is not None and variant is not None:
        raise UsageError("--ratio and --variant were both given.", "Give one of them.")
    source = TextSource(input, text_column, id_column, header=header)
    loaded = Bundle.load(bundle)
    entry = loaded.variant(variant if variant is not None else parse_ratio(ratio or "1"))
    if entry.plugin is not None and not entry.plugin.trained:
        printer.hint(
            f"warning: the plugin of {entry.name} was only initialised; its outputs are meaningless."
        )
    settings = EmbedSettings(
        loaded.path,
        entry.name,
        target=target,
        threads=threads,
        prompt_name=prompt,
        truncate=truncate,
        normalize=normalize,
        batch_size=batch_size,
        chunk_size=chunk_size,
        with_text=with_text,
        allow_unverified=allow_unverified,
        lean_runtime=lean_runtime,
    )
    with ConsoleEmbedProgress(printer) as progress, _what_is_kept(printer, output, progress):
        result = embed_file(
            source, output, settings, processes=processes, restart=restart, replace=replace, progress=progress
        )
    if result.truncated:
        printer.hint(f"{result.truncated:,} of {result.texts:,} texts were truncated to the model's limit.")
    if printer.is_json:
        printer.document({"variant": entry.name, "ratio": entry.ratio, **asdict(result)})
        return
    resumed = f" ({result.resumed_texts:,} by an earlier run)" if result.resumed_texts else ""
    printer.text(
        f"{output}: {result.texts:,} texts{resumed}, {result.tokens:,} tokens, "
        f"{result.hidden_size} numbers each; {result.texts_per_second:,.0f} texts/s, "
        f"{result.tokens_per_second:,.0f} tokens/s."
    )


@contextmanager
def _what_is_kept(printer: Output, output: Path, progress: EmbedProgress) -> Iterator[None]:
    """Say what an unfinished run leaves."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        if (progress.texts or progress.resumed_texts) and (folder := parts_folder(output)).is_dir():
            printer.hint(f"finished texts are kept in {folder}: the same command goes on from them.")
        raise
