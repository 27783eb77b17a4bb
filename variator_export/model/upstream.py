"""Reader for the plugin checkpoints that the paper's authors released.

The keys and formulas come from thunlp/Compression-Plugin at b1216c0, `variator/model/muxT5.py` and
`AdapterLayer.py`. A checkpoint is a pickled state dict in float16. Only tensors are read from the file, and
no code in it is run.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from variator_export.core.encoder_size import EncoderSize
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file
from variator_export.model.plugin_layout import (
    BackboneIdentity,
    Plugin,
    PluginConfig,
    layer_shapes,
    tensor_name,
)

UpstreamDtype = Literal["as-is", "float16", "float32"]

# The authors' names and this package's names. Both order the columns of `down` alike: repeated FFN output,
# then FFN input.
_KINDS = {
    "mux_layer.weight": "compress.weight",
    "mux_layer.bias": "compress.bias",
    "demux_adapter.w_in.weight": "decompress.down.weight",
    "demux_adapter.w_in.bias": "decompress.down.bias",
    "demux_adapter.w_out.weight": "decompress.up.weight",
    "demux_adapter.w_out.bias": "decompress.up.bias",
}
_KEY = re.compile(r"mux_layer\.(0|[1-9]\d*)\.(" + "|".join(map(re.escape, _KINDS)) + ")")
# The object that torch's error names when torch refuses to load it.
_REFUSED = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXAMPLE = "mux_layer.0.mux_layer.weight"


def read_upstream(
    path: Path, size: EncoderSize, backbone: BackboneIdentity, dtype: UpstreamDtype = "as-is"
) -> Plugin:
    """Read a released checkpoint as a plugin of a backbone.

    Args:
        path: The checkpoint file.
        size: Sizes of the backbone's encoder.
        backbone: The backbone.
        dtype: Type of the plugin's tensors; `as-is` keeps float16 and float32.

    Raises:
        UserError: The file is not a checkpoint, holds anything but tensors, or does not fit the backbone.
    """
    state = _load(path)
    layers = _by_layer(path, state)
    config = _config(path, layers, size, backbone)
    tensors: dict[str, np.ndarray] = {}
    for layer, kinds in layers.items():
        for kind, tensor in kinds.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{path}: layer {layer}, {kind} holds values that are NaN or infinite.",
                    "Use another checkpoint.",
                )
            array = _as_type(path, tensor, dtype)
            if not np.isfinite(array).all():
                raise UserError(
                    f"{path}: layer {layer}, {kind} holds values that are too large for {array.dtype}.",
                    "Use another checkpoint, or --dtype float32 if it was float16.",
                )
            tensors[tensor_name(layer, kind)] = array
    return Plugin(config, tensors)


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no file {path}.", "Give a checkpoint from the paper's authors (.pkl).")
    try:
        # Load only tensors and plain containers, because a pickle could run any code.
        with warnings.catch_warnings(action="ignore"):  # torch warns about other pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        what = f"it names {found[1]}" if found else "it is not a pickle of tensors only"
        raise UserError(
            f"{path} is not a checkpoint that holds only tensors: {what}. Nothing in it was run.",
            "If you trust it, save only its state dict: torch.save({name: tensor, ...}, PATH)",
        ) from error
    except Exception as error:  # zipfile, pickle and torch each raise their own errors for truncated files
        raise UserError(
            f"{path} is not a complete torch.save file. Nothing in it was run.", "Copy or download it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a state dict.",
            f"Give the plugin's state dict, with keys such as {_EXAMPLE}.",
        )
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path}: {key} is a {type(value).__name__}, not a tensor.",
                "Save only the plugin's state dict.",
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            raise UserError(
                f"{path}: {key} is a tensor of {value.dtype}, {value.layout} on {value.device.type}; "
                "a plugin holds dense floating-point tensors.",
                "Save it again as float16 or float32.",
            )
    return {key: value.detach() for key, value in content.items()}


def _by_layer(path: Path, state: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{path} has the key {key!r}, which is not a plugin key.",
                f"A plugin has keys such as {_EXAMPLE}; extract only these from the model's state dict.",
            )
        layers.setdefault(int(match[1]), {})[_KINDS[match[2]]] = tensor
    if not layers:
        raise UserError(f"{path} holds no tensors.", "Use another checkpoint.")
    return dict(sorted(layers.items()))


def _config(
    path: Path,
    layers: Mapping[int, Mapping[str, torch.Tensor]],
    size: EncoderSize,
    backbone: BackboneIdentity,
) -> PluginConfig:
    for layer in range(size.num_layers):
        lacking = [kind for kind in _KINDS.values() if kind not in layers.get(layer, {})]
        if lacking:
            raise UserError(
                f"{path} lacks {lacking[0]} of layer {layer}; {backbone.name} has {size.num_layers} encoder "
                "layers.",
                "Use a complete checkpoint, or the backbone that it was made for.",
            )
    surplus = [layer for layer in layers if layer >= size.num_layers]
    if surplus:
        raise UserError(
            f"{path} has {len(layers)} layers; {backbone.name} has {size.num_layers} encoder layers.",
            "Use the backbone that the checkpoint was made for.",
        )
    first = layers[0]
    k, d = first["compress.bias"].numel(), size.hidden_size
    m = first["decompress.down.bias"].numel()
    if k < 2 or m < 1:
        raise UserError(
            f"{path} has ratio {k} and bottleneck {m}; a plugin needs a ratio of 2 or more and a bottleneck "
            "of 1 or more.",
            "Use another checkpoint.",
        )
    config = PluginConfig(
        ratio=k,
        hidden_size=d,
        bottleneck_size=m,
        num_layers=size.num_layers,
        masking="none",  # the only mode in the paper's code
        backbone=backbone,
        training={"stage": "imported", "file": path.name, "sha256": sha256_file(path)},
    )
    shapes = layer_shapes(config)
    for layer, kinds in layers.items():
        for kind, shape in shapes.items():
            found = tuple(kinds[kind].shape)
            if found != shape:
                raise UserError(
                    f"{path}: layer {layer}, {kind} has the shape {found}; a plugin of ratio {k} and "
                    f"bottleneck {m} for hidden size {d} has {shape}.",
                    "Use the backbone that the checkpoint was made for, or another checkpoint.",
                )
    return config


def _as_type(path: Path, tensor: torch.Tensor, dtype: UpstreamDtype) -> np.ndarray:
    if dtype == "as-is" and tensor.dtype not in (torch.float16, torch.float32):
        raise UserError(
            f"{path} holds tensors of {tensor.dtype}; a plugin file holds float16 or float32.",
            "Add --dtype float32.",
        )
    wanted = tensor.dtype if dtype == "as-is" else getattr(torch, dtype)
    return np.ascontiguousarray(tensor.to(wanted).numpy())
