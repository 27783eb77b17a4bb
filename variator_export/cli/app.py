"""The table of commands. Only the requested command is imported, so that `--help` starts at once."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

from variator_export.core.environment import DISTRIBUTION, installed_version


@dataclass(frozen=True)
class Command:
    """A command that is imported only when it is needed.

    Attributes:
        where: MODULE:FUNCTION below `variator_export.cli`, or MODULE:APP for a group of commands.
        help: First line of the command's docstring, shown in the list of commands.
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
        "compile:merge_command", "Merge the engines of copies of one bundle that several machines compiled."
    ),
    "verify": Command(
        "verify:verify_command",
        "Verify that the graphs or engines of a bundle compute what eager PyTorch computes.",
    ),
    "bench": Command(
        "benchmarking.command:bench_command",
        "Time every ratio of a bundle against the alternatives without plugins.",
    ),
    "report": Command(
        "quality.report:report_command",
        "Write a one-page report on a bundle: its contents, verification, speed and quality.",
    ),
    "export-triton": Command(
        "serving.export_triton:export_triton_command",
        "Write a model repository for Triton Inference Server from a bundle.",
    ),
    "run": Command("run.command:run_command", "Run texts through a bundle, without torch or transformers."),
    "embed": Command(
        "serving.embed:embed_command",
        "Write the sentence embeddings of a file of any length, resumable, in constant memory.",
    ),
    "serve": Command("serving.serve:serve_command", "Serve a bundle over HTTP; the ratio follows the load."),
    "inspect": Command(
        "inspect:inspect_command", "Show the contents of a bundle, and check every file against its hash."
    ),
    "evaluate": Command(
        "quality.evaluate:evaluate_command",
        "Measure the quality of every ratio against the uncompressed backbone.",
    ),
    "import": Command(
        "import_upstream:import_command",
        "Convert a plugin released by the paper's authors into a plugin folder.",
    ),
    "push": Command(
        "push:push_command", "Push a bundle, plugins or modules to the Hugging Face Hub, in one commit."
    ),
    "doctor": Command(
        "doctor:doctor_command",
        "Show what is installed, what this machine can build and run, and how to install what is missing.",
    ),
    "schema": Command(
        "schema:schema_command",
        "Print the JSON schema of recipes, for completion and validation in editors.",
    ),
    "train": Command(
        "train:train_app", "Train compression plugins or modules, or fine-tune a classifier for them."
    ),
}


def make_app(loaded: Collection[str] = tuple(COMMANDS)) -> typer.Typer:
    """Create the command-line application.

    Args:
        loaded: The commands to import. The other commands are only listed.
    """
    app = typer.Typer(
        name=DISTRIBUTION,
        context_settings={"help_option_names": ["--help", "-h"]},
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="Export transformers with Variator compression plugins to verified ONNX graphs and TensorRT "
        "engines.",
        epilog="Exit codes: 0 success; 1 a problem with the input or the machine; 2 wrong usage; "
        "3 numbers disagree; 4 slower than --fail-under; 70 a bug in variator-export; 130 interrupted.",
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
    raise AssertionError("a command must be loaded before it runs")


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
