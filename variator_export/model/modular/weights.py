"""The tensors of modules: reading, checking and writing `modules.safetensors`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from variator_export.bundle.variant_files import (
    MODULE_CONFIG_NAME,
    MODULE_TENSORS_NAME,
    QUANTIZED_MODULES_NAME,
)
from variator_export.core.errors import UserError
from variator_export.model.modular.files import load_module_config
from variator_export.model.modular.layout import ModuleConfig, prefix_of
from variator_export.model.weights_file import write_weights

_TYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class ModuleSet:
    """Modules in memory.

    Attributes:
        name: The folder's name.
        config: The content of `module_config.json`.
        tensors: By their names in the file.
    """

    name: str
    config: ModuleConfig
    tensors: Mapping[str, Tensor]

    def state(self, index: int) -> dict[str, Tensor]:
        """The tensors of one module, by their names in the layer."""
        prefix = prefix_of(index)
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def load_modules(folder: Path) -> ModuleSet:
    """Read modules from a folder outside a bundle, and check their tensors.

    Raises:
        UserError: The file is not whole, a tensor is not finite or has a wrong type, or a module has none;
            the message names the file and the tensor.
    """
    config = load_module_config(folder)
    found = ModuleSet(folder.name, config, _read(folder / MODULE_TENSORS_NAME))
    _check_tensors(folder / MODULE_TENSORS_NAME, found)
    return found


def load_bundled(folder: Path, *, quantized: bool) -> ModuleSet:
    """Read modules from a bundle, in its precision.

    Args:
        folder: The folder of modules.
        quantized: Whether to read them as they are quantised, or as they were before.
    """
    name = QUANTIZED_MODULES_NAME if quantized else MODULE_TENSORS_NAME
    return ModuleSet(folder.name, load_module_config(folder), _read(folder / name))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file: {error}.", "Copy or download the modules again."
        ) from error


def _check_tensors(path: Path, modules: ModuleSet) -> None:
    prefixes = tuple(prefix_of(index) for index in range(len(modules.config.modules)))
    stray = sorted(name for name in modules.tensors if not name.startswith(prefixes))
    empty = [index for index in range(len(prefixes)) if not modules.state(index)]
    if stray or empty:
        problem = f"has no tensor of module {empty[0]}" if empty else f"has the tensor {stray[0]}"
        raise UserError(
            f"{path} {problem}; {MODULE_CONFIG_NAME} lists {len(prefixes)} modules.",
            f"Check {MODULE_CONFIG_NAME}, or save the modules again.",
        )
    for name, tensor in modules.tensors.items():
        if tensor.dtype not in _TYPES:
            raise UserError(
                f"{path}: tensor {name} has type {tensor.dtype}; modules hold float32 or float16.",
                "Save the modules again in float32 or float16.",
            )
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{path}: tensor {name} holds {count} values that are NaN or infinite.",
                "Train the modules again with a lower learning rate, or use another checkpoint.",
            )


def save_modules(modules: ModuleSet, folder: Path) -> None:
    """Write a folder of modules. Equal modules produce identical bytes."""
    _check_tensors(folder / MODULE_TENSORS_NAME, modules)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(modules.tensors, folder / MODULE_TENSORS_NAME)
    write_config(modules.config, folder)


def write_config(config: ModuleConfig, folder: Path) -> None:
    """Write `module_config.json`."""
    text = json.dumps(asdict(config), indent=2, ensure_ascii=False)
    (folder / MODULE_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
