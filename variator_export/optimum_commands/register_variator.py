"""`optimum-cli export variator`: `variator-export build` under the names that users of Optimum know.

Installed as `optimum.commands.register.register_variator`: optimum-cli imports every file of that namespace
package, which therefore has no `__init__.py`, and reads REGISTER_COMMANDS. Nothing heavy is imported before a
command runs.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

# Options that are given on as they are; those that may be repeated, and flags.
_REPEATED = ("ratio", "plugin", "target")
_FLAGS = ("replace", "no_speed", "untrained")


class VariatorExportCommand(BaseOptimumCLICommand):
    """Exports a model with compression plugins."""

    COMMAND = CommandInfo(
        name="variator",
        help="Export a transformer with Variator compression plugins to verified ONNX graphs.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options; `variator-export build --help` says more of each."""
        parser.add_argument(
            "-m", "--model", help="A folder, a model of the hub, or package:DISTRIBUTION/PATH."
        )
        parser.add_argument("--task", help="What the model is to do, for example feature-extraction.")
        parser.add_argument("--recipe", help="A YAML file, or the name of a recipe, to build from.")
        parser.add_argument("--ratio", action="append", help="A ratio to build; may be repeated.")
        parser.add_argument("--plugin", action="append", help="A compression plugin; may be repeated.")
        parser.add_argument("--target", action="append", help="What to build for; may be repeated.")
        parser.add_argument(
            "--untrained", action="store_true", help="Make untrained plugins of each --ratio."
        )
        parser.add_argument("--precision", help="float32, float16 or bfloat16.")
        parser.add_argument("--replace", action="store_true", help="Start the bundle afresh.")
        parser.add_argument("--no-speed", action="store_true", help="Do not measure the speed-up.")
        parser.add_argument("output", help="The folder of the bundle.")

    def run(self) -> None:
        """Build; ends the process with the exit code of `variator-export build`."""
        from variator_export.cli.main import main

        given = self.args
        command = ["variator-export", "build", *([given.recipe] if given.recipe else [])]
        command += ["--output", given.output]
        command += ["--backbone", given.model] if given.model else []
        command += ["--task", given.task] if given.task else []
        command += ["--precision", given.precision] if given.precision else []
        for name in _REPEATED:
            for value in getattr(given, name) or ():
                command += [f"--{name}", value]
        command += [f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(given, name)]
        sys.argv = command
        main()


REGISTER_COMMANDS = [(VariatorExportCommand, ExportCommand)]
