"""Pooling for the output `sentence_embedding`, as declared by a sentence-transformers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json, read_json_object
from variator_export.text.settings import read_text_settings

PoolingMode = Literal["mean", "cls", "max", "mean_sqrt_len_tokens"]

# Flags of `1_Pooling/config.json` in older folders. Newer folders name the mode in `pooling_mode`.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}


_INCOMPLETE = (
    "Copy the whole folder again, with its subfolders, or remove modules.json from it to export without "
    "sentence_embedding."
)


@dataclass(frozen=True)
class PoolingSpec:
    """Description of how token vectors become one sentence vector."""

    mode: PoolingMode
    normalize: bool


class Pooling(nn.Module):
    """Pools hidden vectors (B, N, d) with a mask (B, N) to (B, d), as sentence-transformers does."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool hidden vectors; half precision is pooled in float32.

        With mean pooling, a row without any token becomes zeros instead of NaN.
        """
        if hidden.dtype in (torch.float16, torch.bfloat16):
            hidden = hidden.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (B, N, 1)
        if self.spec.mode == "cls":
            pooled = hidden[:, 0]
        elif self.spec.mode == "max":
            pooled = torch.where(mask > 0, hidden, hidden.new_full((), -1e9)).amax(1)
        else:
            count = mask.sum(1).clamp(min=1e-9)
            divisor = count if self.spec.mode == "mean" else count.sqrt()
            pooled = (hidden * mask).sum(1) / divisor
        if not self.spec.normalize:
            return pooled
        norm = (pooled * pooled).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return pooled / norm


def read_pooling(folder: Path) -> PoolingSpec | None:
    """Read the pooling that a model folder declares; None if it is not a sentence-transformers folder.

    Raises:
        UserError: The folder declares something that is not supported. Ignoring it would produce other
            embeddings than sentence-transformers does.
    """
    modules_path = folder / "modules.json"
    if not modules_path.exists():
        return None
    spec: PoolingSpec | None = None
    for module in read_json(modules_path, _INCOMPLETE):
        if not isinstance(module, dict) or not {"type", "path"} <= module.keys():
            raise UserError(f"{modules_path} has an entry that lacks its type or path.", _INCOMPLETE)
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Transformer":
            continue
        if kind == "Pooling":
            path = folder / str(module["path"]) / "config.json"
            _check_prompts(path, folder)
            spec = PoolingSpec(_read_mode(path), normalize=False)
        elif kind == "Normalize" and spec is not None:
            spec = PoolingSpec(spec.mode, normalize=True)
        else:
            raise UserError(
                f"{modules_path} declares a module of type {kind} that cannot be put into the graph.",
                "Supported are Transformer, Pooling and Normalize, in this order. "
                "Remove modules.json from a copy of the folder to export without sentence_embedding.",
            )
    return spec


def _check_prompts(path: Path, folder: Path) -> None:
    """Refuse a pooling without the prompt's tokens: the graph cannot tell them from the text's."""
    included = read_json_object(path, _INCOMPLETE).get("include_prompt", True)
    if not included and any(read_text_settings(folder).prompts.values()):
        raise UserError(
            f"{path} leaves the prompt's tokens out of the pooling (include_prompt), which is not supported.",
            "Remove the prompts from config_sentence_transformers.json in a copy of the folder.",
        )


def _read_mode(path: Path) -> PoolingMode:
    config = read_json_object(path, _INCOMPLETE)
    known = tuple(_FLAGS.values())
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        chosen = [named] if isinstance(named, str) else list(named)
    else:
        chosen = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
        chosen += [
            flag
            for flag, value in config.items()
            if value is True and flag.startswith("pooling_mode") and flag not in _FLAGS
        ]
    if len(chosen) != 1 or chosen[0] not in known:
        raise UserError(
            f"{path} asks for the pooling {chosen}; exactly one of {', '.join(known)} is supported.",
            "Remove modules.json from a copy of the folder to export without sentence_embedding.",
        )
    return next(mode for mode in known if mode == chosen[0])
