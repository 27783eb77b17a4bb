"""One binder per method: builds a variant's own graph from the graph for all and the variant's folder."""

from pathlib import Path

import onnx_ir as ir

from variator_export.graph.bind import bind, bind_baseline
from variator_export.model.plugin_file import load_plugin_config
from variator_export.model.plugin_layout import TENSORS_NAME


def baseline(graph_for_all: Path, _folder: str) -> ir.Model:
    """Build the graph of the backbone without plugins and without padding."""
    return bind_baseline(graph_for_all)


def variator(graph_for_all: Path, folder: str) -> ir.Model:
    """Build the graph of a plugin's variant; its tensors refer to the plugin's file."""
    config = load_plugin_config(graph_for_all.parent / folder)
    return bind(graph_for_all, config, f"{folder}/{TENSORS_NAME}")
