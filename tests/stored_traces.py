"""A store of traces: the same small backbone is traced for dozens of tests, at 6 to 8 seconds each.

A trace is addressed by all that decides it: the code that traces, the libraries under it, the backbone's
configuration, class, pooling, pad token and every bit of its weights. So the store may outlive a run of the
tests (build/test-traces): what has not changed is not traced again, and in a fresh clone everything is.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from artefacts import Artefacts

from variator_export.building.context import TRACED_BY
from variator_export.core.environment import GRAPH_DISTRIBUTIONS, platform_tag, versions
from variator_export.core.hashing import code_digest, sha256_json
from variator_export.model.backbone import Backbone

STORE = Path(__file__).parent.parent / "build" / "test-traces"
Trace = Callable[..., dict[str, ir.Model]]


def stored(trace: Trace) -> Trace:
    """`trace`, which looks into the store first.

    Wrapping twice would wait for its own lock: pytest-xdist's workers inherit the PYTHONPATH of the processes
    that tests start, and conftest.py wraps too.
    """
    if getattr(trace, "looks_into_store", False):
        return trace
    code = sha256_json([code_digest(*TRACED_BY), versions(*GRAPH_DISTRIBUTIONS), platform_tag()])
    artefacts = Artefacts(STORE / code[:16])
    for other in STORE.iterdir():  # of other code or other libraries
        if other.name != code[:16]:
            shutil.rmtree(other, ignore_errors=True)

    def look_up(backbone: Backbone, folder: Path, weights_name: str, *opset: int) -> dict[str, ir.Model]:
        def make(new: Path) -> None:
            for part, model in trace(backbone, new, weights_name, *opset).items():
                ir.save(model, new / f"{part}.onnx")

        kept = artefacts.folder(_address(backbone, weights_name, opset), make)
        shutil.copyfile(kept / weights_name, folder / weights_name)
        models = {}
        for graph in sorted(kept.glob("*.onnx")):
            copy = folder / f"traced.{graph.name}"
            shutil.copyfile(graph, copy)
            models[graph.stem] = ir.load(copy)
            copy.unlink()
        return models

    look_up.looks_into_store = True  # type: ignore[attr-defined]
    look_up.without_store = trace  # type: ignore[attr-defined]
    return look_up


def _address(backbone: Backbone, weights_name: str, opset: tuple[int, ...]) -> str:
    weights = hashlib.sha256()
    for name, tensor in sorted(backbone.state.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256_json(
        [
            weights.hexdigest(),
            backbone.spec.name,
            backbone.info.config.to_json_string(),
            str(backbone.pooling),
            backbone.pad_token_id,
            weights_name,
            *opset,
        ]
    )
