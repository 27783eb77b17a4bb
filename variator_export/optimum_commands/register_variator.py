"""`optimum-cli export variator`: `variator-export build` with the option names that Optimum users know.

Installed as `optimum.commands.register.register_variator`. optimum-cli imports every file of that namespace
package and reads REGISTER_COMMANDS, so the package has no `__init__.py`. Heavy dependencies are imported only
when a command runs.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

# Options passed on unchanged: repeatable options, and flags.
_REPEATED = ("ratio", "plugin", "target")
_SINGLE = ("precision", "calibration", "calibration_column")
_FLAGS = ("replace", "no_speed", "untrained")


class VariatorExportCommand(BaseOptimumCLICommand):
    """Command that exports a model with compression plugins."""

    COMMAND = CommandInfo(
        name="variator",
        help="Export a transformer with Variator compression plugins to verified ONNX graphs.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options; `variator-export build --help` describes each in full."""
        parser.add_argument(
            "-m", "--model", help="A folder, a model on the hub, or package:DISTRIBUTION/PATH."
        )
        parser.add_argument("--task", help="The task of the model, for example feature-extraction.")
        parser.add_argument("--recipe", help="The recipe to build: a YAML file or a recipe name.")
        parser.add_argument("--ratio", action="append", help="A ratio to build; may be repeated.")
        parser.add_argument("--plugin", action="append", help="A compression plugin; may be repeated.")
        parser.add_argument("--target", action="append", help="A target to build for; may be repeated.")
        parser.add_argument(
            "--untrained", action="store_true", help="Create an untrained plugin for each --ratio."
        )
        parser.add_argument("--precision", help="float32, float16, bfloat16, or a quantised precision.")
        parser.add_argument("--calibration", help="Texts to calibrate int8-static, int8-float16 or fp8 on.")
        parser.add_argument("--calibration-column", help="The column of these texts.")
        parser.add_argument(
            "--replace", action="store_true", help="Replace an existing bundle instead of adding to it."
        )
        parser.add_argument("--no-speed", action="store_true", help="Do not measure the speed-up.")
        parser.add_argument("output", help="The folder of the bundle.")

    def run(self) -> None:
        """Build the bundle, and exit with the exit code of `variator-export build`."""
        from variator_export.cli.main import main

        given = self.args
        command = ["variator-export", "build", *([given.recipe] if given.recipe else [])]
        command += ["--output", given.output]
        command += ["--backbone", given.model] if given.model else []
        command += ["--task", given.task] if given.task else []
        for name in _SINGLE:
            if (value := getattr(given, name)) is not None:
                command += [f"--{name.replace('_', '-')}", value]
        for name in _REPEATED:
            for value in getattr(given, name) or ():
                command += [f"--{name}", value]
        command += [f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(given, name)]
        sys.argv = command
        main()


REGISTER_COMMANDS = [(VariatorExportCommand, ExportCommand)]
