"""`variator-export train pretrain | adapt | finetune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from variator_export.cli import train_options as options
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.core.errors import UsageError
from variator_export.pipeline.plan import parse_ratio

if TYPE_CHECKING:
    from variator_export.training.plugin_run import TrainedPlugins

train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train compression plugins, or a classifier to put them into.",
)


@train_app.command("pretrain")
def pretrain_command(
    output: options.OutputOption,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC[@SHARE]",
            help="Plain text: .txt, .jsonl, a folder, or datasets:NAME, and the share of passages that come "
            "from it; may be repeated.",
        ),
    ] = None,
    ratio: Annotated[
        list[str] | None, typer.Option(metavar="K", help="A ratio to train a plugin for; may be repeated.")
    ] = None,
    backbone: options.BackboneOption = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Where the other options start: default, or paper: its own setting."
        ),
    ] = "default",
    steps: options.StepsOption = 4000,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = None,
    schedule: options.ScheduleOption = "linear",
    warmup_steps: options.WarmupOption = 50,
    loss: options.LossOption = None,
    bottleneck_size: Annotated[
        int | None, typer.Option(metavar="N", help="Width of the decompression layer's bottleneck.")
    ] = None,
    masking: Annotated[
        str | None, typer.Option(metavar="MODE", help="none, as in the paper's code, or exclude-padding.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="S", help="Where plugins start: paper, or teacher: closer to it.")
    ] = None,
    decompression: Annotated[
        bool, typer.Option("--decompression/--no-decompression", help="Leave it out only for an ablation.")
    ] = True,
    min_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of the shortest passages.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of the longest passages.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(metavar="X", help="Share of tokens replaced by random ones.")
    ] = None,
    held_out: options.HeldOutOption = 0.02,
    held_out_passages: Annotated[
        int, typer.Option(metavar="N", help="How many passages of the held-out text to look at.")
    ] = 512,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="The field or column of the text in .jsonl and data sets.")
    ] = "text",
    seed: options.SeedOption = 0,
    precision: options.PrecisionOption = "auto",
    eval_every: options.EvalOption = 200,
    patience: options.PatienceOption = None,
    dtype: options.DtypeOption = "float16",
    terms: options.TermsOption = None,
    replace: options.ReplaceOption = False,
    restart: options.RestartOption = False,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Train plugins for a pretrained backbone from plain text, without labels.

    The teacher is the backbone without plugins; several ratios share its forward pass. A run that was killed
    goes on when the same command is given again. On several GPUs or machines: `accelerate launch --multi_gpu
    -m variator_export train pretrain ...`.

    **Examples**

    `variator-export train pretrain --text novels/ --ratio 2 --ratio 4 --output plugins`

    `variator-export train pretrain --text a.jsonl --ratio 4 --preset paper --backbone ./my-bert --output p`
    """
    if not text:
        raise UsageError("There is no text to train on.", "Give --text SRC: a file, a folder, datasets:NAME.")
    if not ratio:
        raise UsageError("There is no ratio to train a plugin for.", "Give, for example, --ratio 4.")
    options.require_training()
    from variator_export.data.texts import read_texts
    from variator_export.training.pretrain import pretrain
    from variator_export.training.settings import (
        PRETRAIN_PRESETS,
        Losses,
        PassageSettings,
        PluginShape,
    )

    base = PRETRAIN_PRESETS[options.choose("--preset", preset, tuple(PRETRAIN_PRESETS))]
    ratios = tuple(dict.fromkeys(parse_ratio(k) for k in ratio))
    shape = options.checked(
        PluginShape,
        {
            "ratios": ratios,
            "bottleneck_size": bottleneck_size or base.bottleneck_size,
            "masking": masking or base.masking,
            "start": start or base.start,
            "decompression": decompression,
        },
    )
    losses = options.checked(Losses, {"hidden": 0.0, **options.parse_losses(loss)}) if loss else base.losses
    passages = options.checked(
        PassageSettings,
        {
            "min_tokens": base.passages.min_tokens if min_tokens is None else min_tokens,
            "max_tokens": base.passages.max_tokens if max_tokens is None else max_tokens,
            "noise": base.passages.noise if noise is None else noise,
            "held_out": held_out,
            "held_out_passages": held_out_passages,
        },
    )
    optimisation = _optimisation(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate or base.learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        seed=seed,
        precision=precision,
        eval_every=eval_every,
        patience=patience,
    )
    printer = Output(format)
    loaded = _load(backbone)
    if not loss and losses.embedding and loaded.pooling is None:
        losses = losses.model_copy(update={"embedding": 0.0})  # the preset's term for sentence embeddings
    progress = ConsoleProgress(printer)
    try:
        result = pretrain(
            loaded,
            read_texts(text, text_field),
            output,
            shape=shape,
            losses=losses,
            passages=passages,
            optimisation=optimisation,
            half=options.choose("--dtype", dtype, ("float16", "float32")) == "float16",
            origin=_origin(terms),
            replace=replace,
            restart=restart,
            progress=progress,
        )
    finally:
        progress.close()
    _print(printer, result)


@train_app.command("adapt")
def adapt_command(
    output: options.OutputOption,
    data: options.DataOption,
    backbone: Annotated[
        str, typer.Option(metavar="SRC", help="The task's model, for example from `train finetune`.")
    ],
    plugin: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="A plugin to train further; may be repeated."),
    ] = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column of the label; only for --loss label=WEIGHT."),
    ] = None,
    header: options.HeaderOption = True,
    validation: options.ValidationOption = None,
    held_out: options.HeldOutOption = 0.05,
    max_tokens: options.MaxTokensOption = 128,
    loss: options.LossOption = None,
    steps: options.StepsOption = 1000,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = 1e-5,
    schedule: options.ScheduleOption = "constant",
    warmup_steps: options.WarmupOption = 0,
    seed: options.SeedOption = 0,
    precision: options.PrecisionOption = "auto",
    eval_every: options.EvalOption = 100,
    patience: options.PatienceOption = None,
    dtype: options.DtypeOption = "float16",
    terms: options.TermsOption = None,
    replace: options.ReplaceOption = False,
    restart: options.RestartOption = False,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Train plugins further for a task, on a backbone that was tuned for it.

    The loss is the paper's (`--loss hidden=1`) and needs no labels. The learning rate of the paper, 1e-5, is
    for tens of thousands of steps; short runs want a higher one.

    **Examples**

    `variator-export train adapt --backbone ./sst2 --plugin plugins/ratio-4 --data train.tsv --text-column
    sentence --output sst2-plugins`
    """
    if not plugin:
        raise UsageError(
            "There is no plugin to train.", "Give --plugin DIR, from `train pretrain` or `import`."
        )
    options.require_training()
    from variator_export.model.plugin_file import load_plugin_config
    from variator_export.training.adapt import adapt
    from variator_export.training.settings import Losses

    optimisation = _optimisation(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        seed=seed,
        precision=precision,
        eval_every=eval_every,
        patience=patience,
    )
    losses = options.checked(Losses, {"hidden": 0.0, **options.parse_losses(loss)} if loss else {})
    folders: dict[str, Path] = {}
    for item in plugin:
        name, separator, folder = item.partition("=")
        path = Path(folder) if separator and not Path(item).exists() else Path(item)
        key = name if path != Path(item) else f"ratio-{load_plugin_config(path).ratio}"
        if key in folders:
            raise UsageError(f"Two plugins have the name {key}.", "Name them apart: --plugin NAME=DIR")
        folders[key] = path
    if losses.label and label_column is None:
        raise UsageError("--loss label needs labels.", "Give --label-column NAME.")
    train, look = _examples(
        data,
        validation,
        held_out,
        seed,
        {"text": text_column, "pair": pair_column, "target": label_column, "header": header},
    )
    printer = Output(format)
    progress = ConsoleProgress(printer)
    try:
        result = adapt(
            _load(backbone),
            folders,
            train,
            look,
            output,
            losses=losses,
            optimisation=optimisation,
            max_tokens=max_tokens,
            half=options.choose("--dtype", dtype, ("float16", "float32")) == "float16",
            origin=_origin(terms),
            replace=replace,
            restart=restart,
            progress=progress,
        )
    finally:
        progress.close()
    _print(printer, result)


@train_app.command("finetune")
def finetune_command(
    output: options.OutputOption,
    data: options.DataOption,
    backbone: options.BackboneOption = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str, typer.Option(metavar="NAME", help="The column of the label; a number from 1.")
    ] = "label",
    header: options.HeaderOption = True,
    validation: options.ValidationOption = None,
    held_out: options.HeldOutOption = 0.05,
    max_tokens: options.MaxTokensOption = 128,
    epochs: Annotated[float, typer.Option(metavar="X", help="How often the data is gone over.")] = 3.0,
    steps: options.StepsOption = None,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = 5e-5,
    warmup_steps: options.WarmupOption = 100,
    seed: options.SeedOption = 0,
    precision: options.PrecisionOption = "auto",
    eval_every: options.EvalOption = 200,
    patience: options.PatienceOption = None,
    terms: options.TermsOption = None,
    replace: options.ReplaceOption = False,
    restart: options.RestartOption = False,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Fine-tune a pretrained encoder to a classifier, for plugins to be adapted to.

    **Examples**

    `variator-export train finetune --data sst2.tsv --text-column sentence --output sst2`

    `variator-export train finetune --data pairs.csv --text-column a --pair-column b --label-column same
    --output same`
    """
    options.require_training()
    from variator_export.model.source import resolve_source
    from variator_export.training.finetune import finetune, steps_for_epochs

    columns = {"text": text_column, "pair": pair_column, "target": label_column, "header": header}
    train, look = _examples(data, validation, held_out, seed, columns)
    optimisation = _optimisation(
        steps=steps or steps_for_epochs(train, batch_size, epochs),
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="linear",
        warmup_steps=warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        precision=precision,
        eval_every=eval_every,
        patience=patience,
    )
    printer = Output(format)
    progress = ConsoleProgress(printer)
    try:
        result = finetune(
            resolve_source(backbone or options.default_backbone()),
            train,
            look,
            output,
            optimisation=optimisation,
            max_tokens=max_tokens,
            origin=_origin(terms),
            replace=replace,
            restart=restart,
            progress=progress,
        )
    finally:
        progress.close()
    if not _is_main_process():
        return
    if printer.is_json:
        printer.document(
            {
                "folder": str(result.folder),
                "labels": list(result.labels),
                "held_out_accuracy": result.accuracy,
                "steps": result.history.steps,
            }
        )
    else:
        printer.text(f"classifier of {', '.join(result.labels)}: {result.folder}")
        printer.text(f"accuracy on held-out data: {result.accuracy:.4f}")


def _optimisation(**values: Any) -> Any:
    from variator_export.training.precision import choose_precision
    from variator_export.training.settings import Optimisation

    options.choose("--precision", values["precision"], ("auto", "float32", "bfloat16"))
    return options.checked(Optimisation, {**values, "precision": choose_precision(values["precision"])})


def _load(source: str | None) -> Any:
    from variator_export.model.backbone import load_backbone, read_backbone_info
    from variator_export.model.source import resolve_source
    from variator_export.model.tokenizer import TextEncoder

    found = resolve_source(source or options.default_backbone())
    return load_backbone(read_backbone_info(found), TextEncoder(found.folder).pad_token_id)


def _examples(
    data: str, validation: str | None, held_out: float, seed: int, columns: dict[str, Any]
) -> tuple[Any, Any]:
    from variator_export.data.examples import Columns, read_examples
    from variator_export.training.task_data import divide

    read = read_examples(data, Columns(**columns))
    if read.targets is not None:
        read.classes()  # refuses a single class
    if validation is not None:
        return read, read_examples(validation, Columns(**columns))
    return divide(read, held_out, seed)


def _origin(terms: str | None) -> Any:
    from variator_export.training.plugin_run import Origin

    return Origin(options.command_line(), terms)


def _is_main_process() -> bool:
    from variator_export.training.trainer import is_main_process

    return is_main_process()


def _print(printer: Output, result: "TrainedPlugins") -> None:
    if not _is_main_process():
        return
    if printer.is_json:
        plugins = {
            name: {"folder": str(folder), "held_out_loss": result.losses[name]}
            for name, folder in result.folders.items()
        }
        printer.document({"plugins": plugins, "steps": result.history.steps})
        return
    for name, folder in result.folders.items():
        printer.text(f"{name}: held-out loss {result.losses[name]:.5f}: {folder}")
