"""`variator-export train`: one file for each command."""

import typer

from variator_export.cli.train.adapt import adapt_command
from variator_export.cli.train.finetune import finetune_command
from variator_export.cli.train.modules import modules_command
from variator_export.cli.train.pretrain import pretrain_command

train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train compression plugins or modules, or fine-tune a classifier for them.",
)
train_app.command("pretrain")(pretrain_command)
train_app.command("modules")(modules_command)
train_app.command("adapt")(adapt_command)
train_app.command("finetune")(finetune_command)
