"""`variator-export import`."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from variator_export.bundle.publishing import exclusive, publish
from variator_export.cli.options import (
    ArchitectureOption,
    BackboneOption,
    OutputOption,
    TaskOption,
    check_architecture,
    choose,
    default_backbone,
)
from variator_export.cli.output import Format, Output
from variator_export.cli.push import PushOption, check_push, push_result
from variator_export.core.environment import require
from variator_export.core.errors import UserError


def import_command(
    upstream: Annotated[
        Path, typer.Argument(help="A checkpoint from the paper's authors: a pickled state dict.")
    ],
    output: OutputOption,
    backbone: BackboneOption = None,
    task: TaskOption = None,
    architecture: ArchitectureOption = None,
    dtype: Annotated[
        str, typer.Option(metavar="T", help="Data type of the plugin file: as-is, float16 or float32.")
    ] = "as-is",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a plugin that is already in the output folder.")
    ] = False,
    push_to_hub: PushOption = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Convert a plugin released by the paper's authors into a plugin folder.

    Only tensors are read from the file; no code in it is run.

    **Examples**

    `variator-export import t5-base-k4.pkl --backbone ./t5-base --output plugins/t5-base-4`
    """
    check_architecture(task, architecture)
    choose("--dtype", dtype, ("as-is", "float16", "float32"))
    for module in ("torch", "transformers"):
        require(module, "export", "Importing a checkpoint")
    check_push(push_to_hub)
    from variator_export.model.backbone_info import read_backbone_info
    from variator_export.model.plugin_card import is_plugin_folder
    from variator_export.model.plugin_file import save_plugin
    from variator_export.model.source import resolve_source
    from variator_export.model.upstream import read_upstream

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        is_plugin = output.is_dir() and is_plugin_folder(output)
        if not (replace and is_plugin):
            raise UserError(
                f"{output} already exists" + ("." if is_plugin else " and holds more than a plugin."),
                "Replace the plugin with --replace." if is_plugin else "Choose another folder with --output.",
            )
    source = resolve_source(backbone or default_backbone())
    info = read_backbone_info(source, architecture, task)
    plugin = read_upstream(upstream, info.size, info.identity, cast(Any, dtype))
    with exclusive(output) as staging:
        save_plugin(plugin, staging)
        publish(staging, output)
    config = plugin.config
    printer = Output(format)
    if not printer.is_json:
        printer.text(f"plugin of ratio {config.ratio}, bottleneck {config.bottleneck_size}: {output}")
        printer.hint(
            f"next: variator-export build --backbone {source.name} --plugin {output} --output BUNDLE"
        )
    pushed = push_result(printer, output, push_to_hub)
    if printer.is_json:
        content = {"plugin": str(output), "ratio": config.ratio, "bottleneck_size": config.bottleneck_size}
        printer.document({**content, "pushed": pushed})
