"""`variator-export train adapt`."""

from typing import TYPE_CHECKING, Annotated

import typer

from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.cli.push import PushOption, check_push
from variator_export.cli.train import common
from variator_export.core.errors import UsageError

if TYPE_CHECKING:
    from variator_export.training.results import TrainedFolders


def adapt_command(
    output: options.OutputOption,
    data: options.DataOption,
    backbone: Annotated[
        str, typer.Option(metavar="SRC", help="The task's model, for example from `train finetune`.")
    ],
    task: options.TaskOption = None,
    architecture: options.ArchitectureOption = None,
    label_word: options.LabelWordOption = None,
    decoder_prompt: options.DecoderPromptOption = None,
    plugin: options.PluginsOption = None,
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Instead of plugins: a folder of modules to train further; may be repeated.",
        ),
    ] = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the label, needed only for --loss label=WEIGHT; or of the target text, for a "
            "backbone that generates text.",
        ),
    ] = None,
    label_map: options.LabelMapOption = None,
    header: options.HeaderOption = True,
    validation: options.ValidationOption = None,
    held_out: options.HeldOutOption = 0.05,
    max_tokens: options.MaxTokensOption = 128,
    max_target_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Truncate longer target texts to N tokens."),
    ] = 128,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM=WEIGHT",
            help=f"A term of the loss: {', '.join(options.LOSS_TERMS)}; of modules also attention; may be "
            "repeated.",
        ),
    ] = None,
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
    push_to_hub: PushOption = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Train plugins or modules further for a task, on a backbone that was fine-tuned for it.

    The default loss of plugins is the paper's: `--loss hidden=1`, which needs no labels, and for a backbone
    that generates text also `--loss decoder=1`, along the target text in --label-column. That of modules is
    `--loss hidden=1 --loss layers=1 --loss attention=1`, and along the target text also `--loss decoder=1`
    and `--loss logits=1`. The paper's learning rate, 1e-5, is meant for tens of thousands of steps; short
    runs need a higher one.

    **Examples**

    `variator-export train adapt --backbone ./sst2 --plugin plugins/ratio-4 --data train.tsv --text-column
    sentence --output sst2-plugins`

    `variator-export train adapt --backbone ./summariser --plugin plugins/ratio-4 --data articles.jsonl
    --text-column article --label-column summary --learning-rate 1e-4 --output summariser-plugins`

    `variator-export train adapt --backbone ./sst2 --module modules/g2 --module modules/g3 --data train.tsv
    --text-column sentence --learning-rate 3e-4 --output sst2-modules`
    """
    if not plugin and not module:
        raise UsageError(
            "There is no plugin to train, and no module.",
            "Give --plugin DIR, from `train pretrain` or `import`; or --module DIR, from `train modules`.",
        )
    if plugin and module:
        raise UsageError("--plugin and --module were both given.", "Train one after the other.")
    options.require_training()
    check_push(push_to_hub)
    from variator_export.training.adapt import adapt
    from variator_export.training.modular.adapt import adapt_modules
    from variator_export.training.modular.pretrain import default_losses
    from variator_export.training.modular.settings import ModuleLosses, Replacing
    from variator_export.training.settings import Losses

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
    known = options.MODULE_LOSS_TERMS if module else options.LOSS_TERMS
    weights = {"hidden": 0.0, **options.parse_losses(loss, known)}
    of_modules = options.checked(ModuleLosses, weights) if loss and module else None
    of_plugins = options.checked(Losses, weights) if loss and plugin else None
    folders = common.module_folders(module) if module else common.plugin_folders(plugin or ())
    if weights.get("label") and label_column is None:
        raise UsageError("--loss label needs labels.", "Give --label-column NAME.")
    names = options.parse_label_map(label_map)
    columns = {"text": text_column, "pair": pair_column, "target": label_column, "header": header}
    printer = Output(format)
    with common.running(printer, output, replace=replace, restart=restart, terms=terms, dtype=dtype) as run:
        words = options.parse_label_words(label_word)
        loaded = common.load(backbone, task, architecture, words, decoder_prompt or "")
        generates = loaded.spec.head.generates
        examples = common.examples_of(
            data, validation, held_out, seed, columns, names, by_class=not generates
        )
        result: TrainedFolders
        if module:
            along = generates and label_column is not None
            result = adapt_modules(
                loaded,
                folders,
                *examples,
                run,
                losses=of_modules or default_losses(loaded, with_decoder=along, of_task=True),
                replacing=Replacing(),
                optimisation=optimisation,
                max_tokens=max_tokens,
                max_target_tokens=max_target_tokens,
            )
        else:
            result = adapt(
                loaded,
                folders,
                *examples,
                run,
                losses=of_plugins or Losses(decoder=1.0 if generates else 0.0),
                optimisation=optimisation,
                max_tokens=max_tokens,
                max_target_tokens=max_target_tokens,
            )
    common.print_results(printer, "modules" if module else "plugins", result, output, push_to_hub)
