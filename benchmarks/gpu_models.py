"""The models of `gpu.py`: made here, or from an installed distribution; nothing is downloaded."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from common import minilm_folder, save_t5_base
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.in_precision import load_in_precision
from variator_export.model.plugin import initialise_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.source import resolve_source

MODELS = ("minilm", "t5-base", "tiny")


@dataclass(frozen=True)
class Model:
    """A backbone in one precision with its plugins.

    Attributes:
        weights: Where they are from, for the report.
        backbone: In the precision.
        exact: The same rounded weights in float64.
        plugins: By ratio; None for 1. Initialised only: how fast a plugin is does not depend on its training.
    """

    name: str
    weights: str
    precision: str
    backbone: Backbone
    exact: Backbone
    plugins: dict[int, Plugin | None]


def make_model(name: str, precision: str, ratios: list[int], folder: Path) -> Model:
    """Load or make a model.

    Args:
        name: One of `MODELS`; `tiny` is for trying the script out.
        precision: float32, float16 or bfloat16.
        ratios: Of the plugins.
        folder: Where a model that is made is written.
    """
    source, weights = _folder(name, folder)
    info = read_backbone_info(resolve_source(str(source)))
    pad = info.config.pad_token_id or 0
    backbone = load_in_precision(info, pad, precision)
    # In float64 every weight of the other types is exact.
    exact = load_backbone(info, pad).to_dtype(torch.float64)
    exact.model.load_state_dict({key: value.double() for key, value in backbone.model.state_dict().items()})
    size = info.size
    plugins = {
        k: None if k == 1 else initialise_plugin(k, size.hidden_size, size.num_layers, seed=k) for k in ratios
    }
    return Model(name, weights, precision, backbone, exact, plugins)


def _folder(name: str, folder: Path) -> tuple[Path, str]:
    if name == "minilm":
        try:
            return minilm_folder(), "all-MiniLM-L6-v2"
        except importlib.metadata.PackageNotFoundError:
            pass
    if name == "t5-base":
        save_t5_base(folder / name)
        return folder / name, "random, of its sizes"
    torch.manual_seed(0)
    hidden, layers, heads = (384, 6, 12) if name == "minilm" else (32, 2, 4)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=30522,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=512,
        )
    )
    model.save_pretrained(folder / name)
    return folder / name, "random, of its sizes"
