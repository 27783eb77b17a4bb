"""`variator-export train modules`."""

from typing import Annotated

import typer

from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.cli.push import PushOption, check_push
from variator_export.cli.train import common
from variator_export.core.errors import UsageError


def modules_command(
    output: options.OutputOption,
    text: options.TextsOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Instead of plain text: a table, as for `train adapt`. The backbone is a task's model.",
        ),
    ] = None,
    granularity: Annotated[
        list[int] | None,
        typer.Option(
            min=2, metavar="G", help="Layers of the encoder that each module replaces; may be repeated."
        ),
    ] = None,
    decoder_granularity: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            metavar="G",
            help="The same for the decoder, of a backbone that generates text; may be repeated.",
        ),
    ] = None,
    backbone: options.BackboneOption = None,
    task: options.TaskOption = None,
    architecture: options.ArchitectureOption = None,
    start: Annotated[
        str,
        typer.Option(
            metavar="L", help="The layer of its group that a module starts from: first, middle or last."
        ),
    ] = "last",
    replace_begin: Annotated[
        float,
        typer.Option(metavar="P", help="Probability in the first step that a module replaces its layers."),
    ] = 0.5,
    replace_end: Annotated[
        float,
        typer.Option(metavar="P", help="The same probability at the end of its rise, and from then on."),
    ] = 0.9,
    replace_rise: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the steps in which that probability rises.")
    ] = 0.5,
    steps: options.StepsOption = 4000,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = 5e-4,
    schedule: options.ScheduleOption = "linear",
    warmup_steps: options.WarmupOption = 50,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM=WEIGHT",
            help=f"A term of the loss: {', '.join(options.MODULE_LOSS_TERMS)}; may be repeated.",
        ),
    ] = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column of the label or the target text, which some terms of the loss need."
        ),
    ] = None,
    label_map: options.LabelMapOption = None,
    header: options.HeaderOption = True,
    validation: options.ValidationOption = None,
    max_target_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Truncate longer target texts to N tokens.")
    ] = 128,
    corruption: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of tokens of plain text left out in spans, which T5's decoder then generates. "
            "Default: 0.15 with --decoder-granularity, else 0.",
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in the shortest passages.")] = 8,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in the longest passages.")] = 128,
    held_out: options.HeldOutOption = 0.02,
    held_out_passages: options.HeldOutPassagesOption = 512,
    text_field: options.TextFieldOption = "text",
    seed: options.SeedOption = 0,
    precision: options.PrecisionOption = "auto",
    eval_every: options.EvalOption = 200,
    patience: options.PatienceOption = None,
    dtype: options.DtypeOption = "float16",
    terms: options.TermsOption = None,
    replace: options.ReplaceOption = False,
    restart: options.RestartOption = False,
    push_to_hub: PushOption = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Train modules: layers that each do the work of several (Modular Transformers).

    Each step replaces some groups of layers by their modules; the original is the teacher. All granularities
    are trained in one run and published as OUTPUT/gG, those of a decoder as OUTPUT/decoder-gG.
    `build --module DIR --assembly SPEC` assembles them. Repeat the command to resume a run that was killed.
    On several GPUs or machines, use `accelerate launch --multi_gpu -m variator_export train modules ...`.

    The default loss is `--loss hidden=1 --loss layers=1 --loss attention=1`, with sentence embeddings also
    `--loss embedding=1`, and along a target text also `--loss decoder=1 --loss logits=1`.

    **Examples**

    `variator-export train modules --text novels/ --granularity 2 --granularity 3 --output modules`

    `variator-export train modules --text a.jsonl --granularity 2 --backbone ./my-bert --output m`

    `variator-export train modules --data train.jsonl --text-column article --label-column summary
    --granularity 2 --decoder-granularity 2 --backbone ./summariser --output m`
    """
    if not text and not data:
        raise UsageError(
            "There is no text to train on.",
            "Give --text SRC: a file, a folder, or datasets:NAME; or --data SRC, a table of a task.",
        )
    if text and data:
        raise UsageError("--text and --data were both given.", "Train on one of them.")
    ignored = {
        "--corruption": corruption if data else None,
        "--label-column": None if data else label_column,
        "--pair-column": None if data else pair_column,
        "--label-map": None if data else label_map,
        "--validation": None if data else validation,
    }
    for option, value in ignored.items():
        if value is not None:
            source = "--data, a table" if data else "--text, plain text"
            raise UsageError(f"{option} does not go with {source}.", "Leave it out.")
    if not granularity and not decoder_granularity:
        raise UsageError(
            "There is no granularity to train modules for.", "Give, for example, --granularity 2."
        )
    options.require_training()
    check_push(push_to_hub)
    from variator_export.data.texts import read_texts
    from variator_export.training.modular.adapt import adapt_modules
    from variator_export.training.modular.pretrain import default_losses, pretrain_modules
    from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
    from variator_export.training.pretrain import T5_CORRUPTION
    from variator_export.training.settings import PassageSettings

    shape = options.checked(
        ModuleShape,
        {
            "granularities": tuple(dict.fromkeys(granularity or ())),
            "decoder_granularities": tuple(dict.fromkeys(decoder_granularity or ())),
            "start": start,
        },
    )
    if corruption is None:
        corruption = T5_CORRUPTION if decoder_granularity else 0.0
    weights = options.parse_losses(loss, options.MODULE_LOSS_TERMS)
    losses = options.checked(ModuleLosses, {"hidden": 0.0, **weights}) if loss else None
    replacing = options.checked(Replacing, {"begin": replace_begin, "end": replace_end, "rise": replace_rise})
    passages = options.checked(
        PassageSettings,
        {
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "held_out": held_out,
            "corruption": corruption,
            "held_out_passages": held_out_passages,
        },
    )
    optimisation = common.optimisation_of(
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
    printer = Output(format)
    with common.running(printer, output, replace=replace, restart=restart, terms=terms, dtype=dtype) as run:
        loaded = common.load(backbone, task, architecture)
        generates = loaded.spec.head.generates
        along = generates and (label_column is not None if data else corruption > 0)
        losses = losses or default_losses(loaded, with_decoder=along, of_task=data is not None)
        if data:
            names = options.parse_label_map(label_map)
            columns = {"text": text_column, "pair": pair_column, "target": label_column, "header": header}
            result = adapt_modules(
                loaded,
                shape,
                *common.examples_of(data, validation, held_out, seed, columns, names, by_class=not generates),
                run,
                losses=losses,
                replacing=replacing,
                optimisation=optimisation,
                max_tokens=max_tokens,
                max_target_tokens=max_target_tokens,
            )
        else:
            result = pretrain_modules(
                loaded,
                read_texts(text or (), text_field),
                run,
                shape=shape,
                losses=losses,
                replacing=replacing,
                passages=passages,
                optimisation=optimisation,
            )
    common.print_results(printer, "modules", result, output, push_to_hub)
