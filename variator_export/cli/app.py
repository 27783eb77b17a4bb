"""The commands. Those that are not asked for are only listed, so that `--help` starts at once."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

from variator_export.core.environment import DISTRIBUTION, installed_version


@dataclass(frozen=True)
class Command:
    """A command that is imported when it is needed.

    Attributes:
        where: MODULE:FUNCTION below `variator_export.cli`, or MODULE:APP of a group of commands.
        help: The first line of its docstring, for the list of commands.
    """

    where: str
    help: str


COMMANDS = {
    "build": Command(
        "build:build_command", "Turn a backbone and its compression plugins into a verified bundle."
    ),
    "compile": Command(
        "compile:compile_command", "Build engines from a finished bundle, on the machine that needs them."
    ),
    "merge": Command(
        "compile:merge_command", "Join the engines of copies of one bundle, compiled on several machines."
    ),
    "verify": Command(
        "verify:verify_command",
        "Verify that the graphs or engines of a bundle compute what eager PyTorch computes.",
    ),
    "bench": Command(
        "bench:bench_command", "Time every ratio of a bundle against what a user would run instead."
    ),
    "report": Command(
        "report:report_command",
        "Write one page about a bundle: what is in it, whether it is verified, what it gains and loses.",
    ),
    "run": Command("run:run_command", "Run texts through a bundle, without torch or transformers."),
    "inspect": Command(
        "inspect:inspect_command", "Show what is in a bundle, and compare every file with its hash."
    ),
    "evaluate": Command(
        "evaluate:evaluate_command",
        "Measure the quality of every ratio against the uncompressed backbone.",
    ),
    "import": Command(
        "import_upstream:import_command",
        "Turn a plugin that the paper's authors released into a plugin folder.",
    ),
    "push": Command("push:push_command", "Write a bundle or plugins to the Hugging Face Hub, in one commit."),
    "doctor": Command(
        "doctor:doctor_command",
        "Say what is installed, what this machine can build and run, and the command for what is missing.",
    ),
    "schema": Command(
        "schema:schema_command",
        "Print the JSON schema of recipes, by which editors complete and check them.",
    ),
    "train": Command("train:train_app", "Train compression plugins, or a classifier to put them into."),
}


def make_app(loaded: Collection[str] = tuple(COMMANDS)) -> typer.Typer:
    """The command line.

    Args:
        loaded: The commands to import; the others only stand in the list.
    """
    app = typer.Typer(
        name=DISTRIBUTION,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="Export transformers with Variator compression plugins to verified ONNX graphs and TensorRT "
        "engines.",
        epilog="Exit codes: 0 done; 1 the input or the machine does not allow it; 2 wrong usage; "
        "3 numbers disagree; 4 too slow for --fail-under; 70 a bug of ours; 130 interrupted.",
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        if name not in loaded:
            app.command(name, help=command.help)(_listed)
            continue
        module, _, attribute = command.where.partition(":")
        found = getattr(import_module(f"variator_export.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _listed() -> None:
    raise AssertionError("a command that is run is loaded")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{DISTRIBUTION} {installed_version(DISTRIBUTION)}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
