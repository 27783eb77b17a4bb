"""One binder per method: builds a variant's own graph from the graph that takes plugins as inputs."""

from pathlib import Path

import onnx_ir as ir

from variator_export.bundle.variant_files import VariantFiles
from variator_export.graph.assemblies.variant import assemble_variant
from variator_export.graph.bind import bind, bind_baseline, bind_baseline_loaded, bind_loaded
from variator_export.graph.defaults import load_without_defaults
from variator_export.model.backbone_info import BackboneInfo
from variator_export.model.plugin_file import load_plugin_config
from variator_export.model.plugin_layout import TENSORS_NAME


def baseline(any_ratio: Path, _files: VariantFiles, _info: BackboneInfo) -> ir.Model:
    """Build the graph of the backbone without plugins and without padding."""
    return bind_baseline(any_ratio)


def variator(any_ratio: Path, files: VariantFiles, _info: BackboneInfo) -> ir.Model:
    """Build the graph of a plugin's variant; its tensors refer to the plugin's file."""
    return bind(any_ratio, load_plugin_config(files.plugin_folder), f"{files.plugin}/{TENSORS_NAME}")


def modular(any_ratio: Path, files: VariantFiles, info: BackboneInfo) -> ir.Model:
    """Build the graph of an assembly, with or without a plugin."""
    model = load_without_defaults(any_ratio)
    assemble_variant(model, files, info)
    if files.plugin is None:
        return bind_baseline_loaded(model)
    config = load_plugin_config(files.plugin_folder)
    return bind_loaded(model, any_ratio.parent, config, f"{files.plugin}/{TENSORS_NAME}")
