"""The plugin's fused kernels: their numbers in Triton's interpreter, and their compilation without a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import plugin_for
from torch import Tensor
from triton import knobs

from variator_export.core.errors import UserError
from variator_export.core.precision import FLOAT16, find_precision
from variator_export.engines.eager import EagerModel
from variator_export.kernels import operators
from variator_export.kernels.ahead_of_time import COMPUTE_CAPABILITIES, compile_kernel
from variator_export.kernels.launch import PluginSizes
from variator_export.model.augmented import AugmentedModel
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionLayer, CompressionPlugin, DecompressionLayer
from variator_export.verification.judging.compare import deviation

# Shared memory of a block, at most: Ada and consumer Blackwell have the least.
LEAST_SHARED = 99 * 1024
# Of the largest value: a few roundings of the result, and of the operands in between.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """conftest.py has Triton interpret its kernels on the CPU, from its import on."""
    assert knobs.runtime.interpret


class Case:
    """Random weights of a layer's plugin, and vectors of 2 rows; some are large, as in trained models."""

    def __init__(self, k: int, d: int, m: int, windows: int, dtype: torch.dtype) -> None:
        torch.manual_seed(k * d + m)
        self.compress, self.decompress = CompressionLayer(k, d), DecompressionLayer(d, m)
        for parameter in (*self.compress.parameters(), *self.decompress.parameters()):
            parameter.data.normal_(0, 0.08)
            parameter.data = parameter.data.to(dtype).float()
        self.dtype = dtype
        self.x = (torch.randn(2, windows, k, d) + 3 * (torch.arange(d) == 5)).to(dtype)
        self.y = torch.randn(2, windows, d).to(dtype)
        self.keep = torch.rand(2, windows, k) > 0.4
        self.keep[0, 0] = False

    def weights(self) -> dict[str, Tensor]:
        both = {**dict(self.compress.named_parameters(prefix="compress"))}
        both |= dict(self.decompress.named_parameters(prefix="decompress"))
        return {name: tensor.detach().to(self.dtype) for name, tensor in both.items()}


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[found.dtype]


CASES = [
    (2, 32, 64, 9),
    (3, 40, 10, 7),
    (4, 384, 64, 3),
    (5, 33, 17, 4),
    (7, 48, 64, 5),
    (8, 64, 128, 3),
    (16, 96, 128, 2),
    (16, 40, 64, 1),
    (4, 48, 200, 2),
    (1, 32, 1, 6),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("k", "d", "m", "windows"), CASES)
@torch.inference_mode()
def test_the_kernels_compute_what_the_plugin_does(
    k: int, d: int, m: int, windows: int, dtype: torch.dtype
) -> None:
    case = Case(k, d, m, windows, dtype)
    own = case.weights()
    first = own["compress.weight"], own["compress.bias"], own["decompress.down.weight"]
    last = [own[f"decompress.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")]
    x, y = case.x.float(), case.y.float()
    for keep in (None, case.keep):
        compressed, projected = operators.compress(case.x, keep, *first)
        assert_near(compressed, case.compress(x, keep))
        assert_near(projected, x @ own["decompress.down.weight"][:, d:].float().T)
        assert compressed.dtype == projected.dtype == dtype
        if keep is not None:
            assert (compressed[0, 0] == 0).all(), "nothing of the window is included"
    expected = case.decompress(y, x)
    assert_near(operators.decompress(case.y, case.x, projected, *last), expected)
    assert_near(operators.decompress(case.y, case.x, projected, *last, residual=True), expected + x)
    norm = torch.randn(2, d).to(dtype)
    found = operators.decompress(case.y, case.x, projected, *last, *norm, 1e-5, True)
    assert_near(found, torch.nn.functional.layer_norm(expected + x, (d,), *norm.float(), 1e-5))
    found = operators.decompress(case.y, case.x, projected, *last, norm[0], None, 1e-5, True)
    assert_near(found, torch.nn.functional.layer_norm(expected + x, (d,), norm[0].float(), None, 1e-5))


@torch.inference_mode()
def test_a_norm_of_vectors_far_from_0_keeps_its_digits() -> None:
    """A variance by the difference of two large sums would be 0 here, or negative."""
    case = Case(4, 200, 16, 3, torch.float32)
    own = case.weights()
    last = [own[f"decompress.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")]
    y = case.y + 3000
    projected = torch.zeros(2, 3, 4, 16)
    norm = torch.ones(200), torch.zeros(200)
    found = operators.decompress(y, case.x * 0, projected, *last, *norm, 1e-5)
    exact = DecompressionLayer(200, 16).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in case.decompress.state_dict().items()})
    wanted = torch.nn.functional.layer_norm(exact(y.double(), case.x.double() * 0), (200,), eps=1e-5)
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("masking", ["none", "exclude-padding"])
@pytest.mark.parametrize(
    ("model", "precision"),
    [("bert", "float32"), ("bert", "bfloat16"), ("modernbert", "float32"), ("t5-v1.0", "float32")],
)
def test_a_model_with_fused_kernels_agrees_with_one_without(
    load_model: Callable[..., Backbone], model: str, precision: str, masking: str
) -> None:
    backbone = load_model(model).in_precision(find_precision(precision))
    plugin = CompressionPlugin.from_file(plugin_for(backbone, 3, masking=masking)).to(backbone.dtype)
    ids = np.random.default_rng(0).integers(5, 900, (2, 10))
    mask = (np.arange(10) < np.array([[10], [4]])).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}
    inputs = {name: inputs[name] for name in backbone.spec.family.inputs}
    expected = EagerModel(backbone, AugmentedModel(backbone, plugin)).run(inputs)
    for name, found in EagerModel(backbone, AugmentedModel(backbone, plugin, fused=True)).run(inputs).items():
        limit = 2e-6 if precision == "float32" else 1e-2
        assert deviation(found, expected[name]).relative_frobenius < limit


def test_what_the_kernels_cannot_run_is_refused(
    load_model: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_model("t5-v1.0").in_precision(FLOAT16)
    plugin = CompressionPlugin.from_file(plugin_for(backbone, 2)).to(backbone.dtype)
    inputs = {name: np.ones((1, 4), np.int64) for name in backbone.spec.family.inputs}
    with pytest.raises(UserError, match=r"returns torch.float32 for torch.float16") as raised:
        EagerModel(backbone, AugmentedModel(backbone, plugin, fused=True)).run(inputs)
    assert "bfloat16" in str(raised.value.hint)
    for ratio, units in ((17, 64), (4, 257)):
        with pytest.raises(UserError, match=f"the plugin has {ratio} and {units}"):
            PluginSizes(384, ratio, units)
    wide = [torch.ones(size).double() for size in ((1, 1, 2, 4), (2, 8), (2,), (3, 8))]
    with pytest.raises(UserError, match="and the tensors are float64"):
        operators.compress(wide[0], None, *wide[1:])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="run on NVIDIA GPUs, and the tensors are on cpu"):
        operators.compress(torch.ones(1, 1, 2, 4), None, torch.ones(2, 8), torch.ones(2), torch.ones(3, 8))


@torch.inference_mode()
def test_the_operators_tell_their_shapes() -> None:
    case = Case(4, 32, 16, 3, torch.float32)
    own = case.weights()
    first = own["compress.weight"], own["compress.bias"], own["decompress.down.weight"]
    torch.library.opcheck(operators.compress, (case.x, case.keep, *first), test_utils="test_faketensor")
    _, projected = operators.compress(case.x, None, *first)
    last = [own[f"decompress.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")]
    torch.library.opcheck(
        operators.decompress, (case.y, case.x, projected, *last), test_utils="test_faketensor"
    )


# In a process of its own: the tests' interprets the kernels.
PROGRAM = """
import itertools, sys
from variator_export.kernels import operators
from variator_export.kernels.ahead_of_time import COMPUTE_CAPABILITIES, compile_kernel
from variator_export.kernels.launch import PluginSizes
least, folder = int(sys.argv[1]), sys.argv[2]
usual = itertools.product(COMPUTE_CAPABILITIES, ["bfloat16"], [PluginSizes(384, 4, 64)])
odd = [("sm89", dtype, PluginSizes(d, k, m)) for dtype in ("float32", "float16")
       for d, k, m in ((768, 2, 64), (768, 16, 256), (1024, 3, 100))]
for capability, dtype, sizes in [*usual, *odd]:
    kinds = ("compress", {"masked": True}), ("compress", {}), ("decompress", {"epsilon": 1e-12})
    for kind, options in kinds:
        kernel = compile_kernel(kind, capability, dtype, sizes, **options)
        assert kernel.shared_bytes <= least, (capability, dtype, sizes, kind, kernel.shared_bytes)
        assert kernel.threads == 128
        assert ".version 8.7" in kernel.ptx, "older drivers would refuse it"
        assert f".reqntid {kernel.threads}" in kernel.ptx
        assert f".target {capability.replace('sm', 'sm_')}" in kernel.ptx
        declared = kernel.ptx.split(f".entry {kernel.name}(")[1].split(")")[0]
        assert declared.count(".param") == len(kernel.arguments)
        print(capability, dtype, kind)
    open(f"{folder}/{capability}-{dtype}.ptx", "w").write(kernel.ptx)
"""


def test_the_kernels_are_compiled_for_every_gpu_without_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LEAST_SHARED), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert result.returncode == 0, result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()} == {*COMPUTE_CAPABILITIES}
    # NVIDIA's assembler accepts what is left of the assembly.
    for file in tmp_path.glob("*.ptx"):
        target = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
        assert target is not None
        cubin, assembler = tmp_path / "kernel.cubin", knobs.nvidia.ptxas.path
        subprocess.run([assembler, f"--gpu-name={target[1]}", "-o", cubin, file], check=True)


def test_another_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="not compiled for sm75") as raised:
        compile_kernel("compress", "sm75", "float16", PluginSizes(384, 4, 64))
    assert "sm80" in str(raised.value.hint)
