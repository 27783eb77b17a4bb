"""`variator-export inspect`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import BackboneEntry
from variator_export.cli.kernels import print_kernels
from variator_export.cli.output import Format, Output
from variator_export.core.axes import is_key_or_value
from variator_export.core.parts import DECODER, ENCODER, MODEL
from variator_export.sessions import Bundle


def inspect_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="ENGINE",
            help="List the kernels of an engine by layer. A variant's name, or the engine's file.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Show the contents of a bundle, and check every file against its hash.

    **Examples**

    `variator-export inspect artifacts/minilm`

    `variator-export inspect artifacts/minilm --kernels ratio-4`

    `variator-export inspect artifacts/minilm --format json`
    """
    printer = Output(format)
    loaded = Bundle.load(bundle)
    loaded.check_all()
    if kernels is not None:
        print_kernels(printer, loaded, kernels)
        return
    if printer.is_json:
        printer.document({"path": str(loaded.path), **loaded.manifest.model_dump(mode="json")})
        return
    manifest = loaded.manifest
    backbone = manifest.backbone
    limit = "no limit" if backbone.max_length is None else f"at most {backbone.max_length} tokens"
    printer.text(f"{loaded.path}: {len(manifest.files)} files, every hash matches the manifest")
    printer.text(
        f"backbone: {backbone.source} ({backbone.architecture}, {backbone.task or 'task not recorded'}, "
        f"{backbone.num_layers} layers, hidden size "
        f"{backbone.hidden_size}, {manifest.precision}, {limit})"
    )
    default = f"{ENCODER if backbone.generates else MODEL}.onnx"
    printer.text(f"graphs: opset {manifest.opset}; {default} is {manifest.default_variant}")
    printer.text(f"inputs: {', '.join(backbone.inputs)}; outputs: {', '.join(_shown_outputs(backbone))}")
    if backbone.generates:
        for variant in manifest.by_decoder():
            whose = "the same for every ratio" if variant.decoder_name == ANY_RATIO else variant.decoder_name
            printer.text(f"decoder: {variant.decoder_graph}, {whose}")
    for name, modules in manifest.modules.items():
        state = "trained" if modules.trained else "copies of layers"
        layers = ", ".join(f"{first}-{last}" for first, last, _ in modules.groups)
        printer.text(f"modules {name}: {modules.stack} layers {layers}, from {modules.source}, {state}")
    if backbone.label_words is not None:
        words = ", ".join(f"{label}={word}" for label, word in backbone.label_words.items())
        prompt = f", after the prompt {backbone.decoder_prompt!r}" if backbone.decoder_prompt else ""
        printer.text(f"label words: {words}{prompt}")
    made_by = (f"{name} {value}" for name, value in manifest.made_by.items() if name != "code")
    printer.text(f"made by: {', '.join(made_by)}")
    printer.text()
    printer.table(_variants_table(loaded))
    printer.text()
    printer.table(_files_table(loaded))


def _shown_outputs(backbone: BackboneEntry) -> list[str]:
    """The outputs, with the keys and values of all layers as one."""
    own = [name for name in backbone.outputs if not is_key_or_value(name)]
    return own if len(own) == len(backbone.outputs) else [*own, "keys and values for the decoder"]


def _variants_table(bundle: Bundle) -> Table:
    table = Table(title="Variants", title_justify="left")
    has_assemblies = bool(bundle.manifest.branches)
    assembly = ("assembly",) if has_assemblies else ()
    for name in ("name", *assembly, "ratio", "plugin", "masking", "graph", "engines"):
        table.add_column(name)
    for variant in bundle.manifest.variants:
        plugin = variant.plugin
        table.add_row(
            variant.name,
            *([variant.assembly_spec or "original"] if has_assemblies else []),
            str(variant.ratio),
            variant.plugin_state,
            "" if plugin is None else plugin.masking,
            variant.graph,
            "\n".join(bundle.engine_states(variant.name)),
        )
    if states := bundle.engine_states(ANY_RATIO):
        original = ["original"] if has_assemblies else []
        graph = bundle.manifest.any_ratio_graph
        table.add_row(ANY_RATIO, *original, "all", "", "", graph, "\n".join(states))
    for variant in bundle.manifest.by_decoder() if bundle.manifest.backbone.generates else ():
        if states := bundle.engine_states(variant.decoder_name, DECODER):
            name = variant.decoder_name
            layers = [("original" if name == ANY_RATIO else name)] if has_assemblies else []
            table.add_row("decoder", *layers, "all", "", "", variant.decoder_graph, "\n".join(states))
    return table


def _files_table(bundle: Bundle) -> Table:
    table = Table(title="Files", title_justify="left")
    table.add_column("file")
    table.add_column("MB", justify="right")
    table.add_column("sha256")
    for name, entry in bundle.manifest.files.items():
        table.add_row(name, f"{entry.size_bytes / 1e6:.2f}", entry.sha256[:16])
    return table
