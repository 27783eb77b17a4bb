"""`variator-export train finetune`."""

from typing import Annotated

import typer

from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.cli.train import common


def finetune_command(
    output: options.OutputOption,
    data: options.DataOption,
    backbone: options.BackboneOption = None,
    text_column: options.TextColumnOption = "text",
    pair_column: options.PairColumnOption = None,
    label_column: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Column of the label: its name, or with --no-header its number from 1."
        ),
    ] = "label",
    header: options.HeaderOption = True,
    validation: options.ValidationOption = None,
    held_out: options.HeldOutOption = 0.05,
    max_tokens: options.MaxTokensOption = 128,
    epochs: Annotated[
        float,
        typer.Option(min=1e-6, max=1e6, metavar="X", help="Passes over the data, unless --steps is given."),
    ] = 3.0,
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
    """Fine-tune a pretrained encoder as a classifier, to adapt plugins to it afterwards.

    **Examples**

    `variator-export train finetune --data sst2.tsv --text-column sentence --output sst2`

    `variator-export train finetune --data pairs.csv --text-column a --pair-column b --label-column same
    --output same`
    """
    options.require_training()
    from variator_export.model.source import resolve_source
    from variator_export.training.finetune import finetune, steps_for_epochs

    columns = {"text": text_column, "pair": pair_column, "target": label_column, "header": header}
    printer = Output(format)
    with common.running(printer, output, replace=replace, restart=restart, terms=terms) as run:
        train, look = common.examples_of(data, validation, held_out, seed, columns)
        optimisation = common.optimisation_of(
            steps=steps_for_epochs(train, batch_size, epochs) if steps is None else steps,
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
        result = finetune(
            resolve_source(backbone or options.default_backbone()),
            train,
            look,
            run,
            optimisation=optimisation,
            max_tokens=max_tokens,
        )
    if not common.is_main():
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
