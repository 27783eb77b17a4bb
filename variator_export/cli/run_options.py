"""Options of the commands that run texts through a bundle: `run`, `embed` and `serve`.

They stand apart from `options.py`, because the names of the targets are not needed by every command's --help.
"""

from typing import Annotated

import typer

from variator_export.cli import completion
from variator_export.engines.targets import TARGETS

RunTargetOption = Annotated[
    str,
    typer.Option(
        metavar="T",
        help=f"The target to run on: {', '.join(TARGETS.names())}.",
        autocompletion=completion.run_targets,
    ),
]
VariantOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The variant to run, instead of --ratio.")
]
TruncateOption = Annotated[
    bool,
    typer.Option(
        help="Whether to truncate texts to the model's limit, as its users do, or refuse longer ones."
    ),
]
