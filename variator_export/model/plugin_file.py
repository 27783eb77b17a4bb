"""Compression plugin files: `plugin_config.json` and `plugin.safetensors` (docs/plugin-format.md).

This module needs neither torch nor transformers, so a session can read plugins where those are not installed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import Variant
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_files
from variator_export.model.config_file import read_config
from variator_export.model.plugin_layout import (
    CONFIG_NAME,
    TENSORS_NAME,
    Plugin,
    PluginConfig,
    expected_shapes,
    null_plugin,
)

_UNTRAINED = "Until you have one, `build --untrained --ratio K` measures the speed."


@dataclass(frozen=True)
class PluginHost:
    """The backbone in which a plugin is supposed to run."""

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    weights_sha256: str


def check_plugin_fits(config: PluginConfig, source: str, host: PluginHost) -> None:
    """Refuse a plugin that was made for another backbone.

    Args:
        config: The plugin's configuration.
        source: Source of the plugin, for the error message.
        host: The backbone.

    Raises:
        UserError: The plugin has another hidden size or number of layers, or was made for another backbone.
    """
    for what, found, expected in (
        ("hidden size", config.hidden_size, host.hidden_size),
        ("number of layers", config.num_layers, host.num_layers),
    ):
        if found != expected:
            raise UserError(
                f"The plugin {source} has the {what} {found}; the backbone {host.name} has {expected}.",
                f"Use a plugin that was made for this backbone. {_UNTRAINED}",
            )
    made_for = config.backbone
    if made_for is None:
        return
    if made_for.model_type != host.model_type:
        raise UserError(
            f"The plugin {source} was made for a {made_for.model_type} backbone; {host.name} is "
            f"a {host.model_type}.",
            "Use a plugin that was made for this backbone.",
        )
    if made_for.weights_sha256 not in (None, host.weights_sha256):
        raise UserError(
            f"The plugin {source} was made for the backbone {made_for.name} with weights of sha256 "
            f"{made_for.weights_sha256}; those of {host.name} have {host.weights_sha256}.",
            f"Use that backbone, or a plugin that was made for this one. {_UNTRAINED}",
        )


def plugin_files(folder: Path) -> tuple[Path, Path]:
    """Find the two files of a plugin folder: configuration and tensors.

    Raises:
        UserError: The folder or one of the files is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"The plugin folder {folder} does not exist.",
            f"Give a folder that holds {CONFIG_NAME} and {TENSORS_NAME}.",
        )
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise UserError(
                f"The plugin folder {folder} has no {name}.",
                f"A plugin is a folder with {CONFIG_NAME} and {TENSORS_NAME}.",
            )
    return folder / CONFIG_NAME, folder / TENSORS_NAME


@dataclass(frozen=True)
class ResolvedPlugin:
    """A plugin folder whose configuration was read and whose files were hashed.

    Attributes:
        folder: Path of the folder on this machine.
        config: The content of `plugin_config.json`.
        sha256: One hash over the plugin's two files.
    """

    folder: Path
    config: PluginConfig
    sha256: str


def resolve_plugin(folder: Path) -> ResolvedPlugin:
    """Read the configuration of a plugin folder and hash its files.

    Raises:
        UserError: Same as `load_plugin_config`.
    """
    return ResolvedPlugin(folder, load_plugin_config(folder), plugin_sha256(folder))


def plugin_sha256(folder: Path) -> str:
    """One hash over the two files of a plugin folder."""
    return sha256_files({path.name: path for path in plugin_files(folder)})


def load_plugin_config(folder: Path) -> PluginConfig:
    """Read and check `plugin_config.json` of a plugin folder.

    Raises:
        UserError: The file is missing or not JSON, or a field is unknown, missing or of the wrong type.
    """
    path, _ = plugin_files(folder)
    return read_config(path, PluginConfig, "a plugin configuration", "docs/plugin-format.md")


def load_plugin(folder: Path) -> Plugin:
    """Read a compression plugin and check its tensors.

    The file must hold every expected tensor and no others, with the right shapes and finite values.

    Raises:
        UserError: A check failed; the message names the file and the tensor.
    """
    config = load_plugin_config(folder)
    path = folder / TENSORS_NAME
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            for name, dtype in sorted(dtypes.items()):
                if dtype not in ("F32", "F16"):
                    raise UserError(
                        f"{path}: tensor {name} has type {dtype}; a plugin holds F32 or F16.",
                        "Save the plugin again in float32 or float16.",
                    )
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file: {error}.", "Copy or download the plugin again."
        ) from error
    _check_tensors(path, config, tensors)
    return Plugin(config, tensors)


def _check_tensors(path: Path, config: PluginConfig, tensors: Mapping[str, np.ndarray]) -> None:
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"also has {', '.join(extra[:3])}"] if extra else []
        raise UserError(
            f"{path} {' and '.join(parts)} (missing: {len(missing)}, unexpected: {len(extra)}); a plugin of "
            f"{config.num_layers} layers has {len(expected)} tensors.",
            f"Check num_layers in {CONFIG_NAME}, or save the plugin again.",
        )
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {found.shape}; expected {shape} for ratio {config.ratio}, "
                f"hidden size {config.hidden_size} and bottleneck size {config.bottleneck_size}.",
                f"Correct {CONFIG_NAME}, or save the plugin again.",
            )
        if not np.isfinite(found).all():
            count = int(np.count_nonzero(~np.isfinite(found)))
            raise UserError(
                f"{path}: tensor {name} holds {count} values that are NaN or infinite.",
                "Train the plugin again with a lower learning rate, or use another checkpoint.",
            )


def save_plugin(plugin: Plugin, folder: Path) -> None:
    """Write a plugin folder. Equal plugins produce identical bytes."""
    _check_tensors(folder / TENSORS_NAME, plugin.config, plugin.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {name: np.ascontiguousarray(plugin.tensors[name]) for name in sorted(plugin.tensors)}
    (folder / TENSORS_NAME).write_bytes(save(ordered))
    text = json.dumps(asdict(plugin.config), indent=2, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_variant_plugin(bundle: BundleFiles, variant: Variant) -> Plugin:
    """Check the hashes of a variant's plugin and load it; for ratio 1, return the plugin of zeros."""
    if variant.plugin is None:
        backbone = bundle.manifest.backbone
        return null_plugin(backbone.num_layers, backbone.hidden_size)
    for name in (CONFIG_NAME, TENSORS_NAME):
        bundle.file(f"{variant.plugin.folder}/{name}")
    return load_plugin(bundle.path / variant.plugin.folder)
