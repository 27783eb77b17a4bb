"""Importing the paper's checkpoints: the same outputs as its formulas, and refusal of everything else.

Shapes: B batch, W windows, k ratio, d hidden size, m bottleneck size, L layers.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import call
from conftest import copy_tokenizer
from torch import Tensor

from variator_export.cli.app import make_app
from variator_export.core.encoder_size import EncoderSize
from variator_export.core.errors import UserError
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import load_plugin
from variator_export.model.plugin_layout import BackboneIdentity
from variator_export.model.upstream import read_upstream

K, D, M, L = 4, 32, 5, 2
SIZE = EncoderSize(num_layers=L, hidden_size=D, attention_size=D, intermediate_size=48, num_ffn_matrices=2)
BACKBONE = BackboneIdentity(model_type="bert", name="small")


def _upstream_state(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(L):
        for name, shape in {
            "mux_layer.weight": (K, K * D),
            "mux_layer.bias": (K,),
            "demux_adapter.w_in.weight": (M, 2 * D),
            "demux_adapter.w_in.bias": (M,),
            "demux_adapter.w_out.weight": (D, M),
            "demux_adapter.w_out.bias": (D,),
        }.items():
            state[f"mux_layer.{layer}.{name}"] = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
    return state


def _save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _paper_feed_forward(
    state: dict[str, Tensor], layer: int, x: Tensor, ffn: Callable[[Tensor], Tensor]
) -> Tensor:
    """What the paper's code computes around one feed-forward network, written out from its description."""
    weights = {name.removeprefix(f"mux_layer.{layer}."): t.float() for name, t in state.items()}
    batch, length, d = x.shape
    windows = x.view(batch, length // K, K * d)
    scores = windows @ weights["mux_layer.weight"].T + weights["mux_layer.bias"]
    mixed = (torch.softmax(scores, -1).unsqueeze(-1) * x.view(batch, length // K, K, d)).sum(2)
    repeated = ffn(mixed).repeat_interleave(K, dim=1)
    both = torch.cat([repeated, x], dim=-1)
    inner = torch.tanh(both @ weights["demux_adapter.w_in.weight"].T + weights["demux_adapter.w_in.bias"])
    return repeated + inner @ weights["demux_adapter.w_out.weight"].T + weights["demux_adapter.w_out.bias"]


def test_an_imported_plugin_computes_what_the_papers_code_computes(tmp_path: Path) -> None:
    state = _upstream_state()
    plugin = read_upstream(_save(tmp_path / "k4.pkl", state), SIZE, BACKBONE)
    assert {array.dtype for array in plugin.tensors.values()} == {np.dtype(np.float16)}
    modules = CompressionPlugin.from_file(plugin).layer_plugins()
    x = torch.randn(3, 8, D, generator=torch.Generator().manual_seed(1))
    for layer in range(L):
        windows = x.view(3, 2, K, D)
        found = modules[layer].decompress(torch.sin(modules[layer].compress(windows)), windows)
        expected = _paper_feed_forward(state, layer, x, torch.sin)
        torch.testing.assert_close(found.view(3, 8, D), expected, rtol=0, atol=1e-6)


def test_parameters_are_tensors(tmp_path: Path) -> None:
    state = {name: torch.nn.Parameter(tensor) for name, tensor in _upstream_state().items()}
    assert read_upstream(_save(tmp_path / "k4.pkl", state), SIZE, BACKBONE).config.ratio == K


def test_half_precision_is_kept_or_widened_on_request(tmp_path: Path) -> None:
    path = _save(tmp_path / "k4.pkl", _upstream_state())
    kept, wide = read_upstream(path, SIZE, BACKBONE), read_upstream(path, SIZE, BACKBONE, "float32")
    for name, array in kept.tensors.items():
        assert wide.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(wide.tensors[name], array.astype(np.float32))
    bfloat = _save(tmp_path / "bf16.pkl", _upstream_state(torch.bfloat16))
    with pytest.raises(UserError, match=r"holds tensors of torch\.bfloat16"):
        read_upstream(bfloat, SIZE, BACKBONE)
    assert read_upstream(bfloat, SIZE, BACKBONE, "float32").config.ratio == K


class _Payload:
    """A pickle that would run a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.filterwarnings("error")  # torch warns of a pickle's protocol
def test_a_file_with_code_in_it_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = _save(tmp_path / "evil.pkl", {**_upstream_state(), "x": _Payload(marker)})
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(_Payload(marker)))
    for file in (path, plain):
        with pytest.raises(UserError, match="holds only tensors") as error:
            read_upstream(file, SIZE, BACKBONE)
        assert re.search(r"names [a-zA-Z]|not a pickle of tensors only", error.value.message)
        assert "Nothing in it was run" in error.value.message
        # torch's own message says how to run it all the same.
        assert "weights_only" not in str(error.value)
    assert not marker.exists()
    pickle.loads(plain.read_bytes())
    assert marker.exists()  # it would have


def _without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _upstream_state().items() if name != key}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_without("mux_layer.1.demux_adapter.w_out.bias"), "lacks decompress.up.bias of layer 1"),
        (
            {k: v for k, v in _upstream_state().items() if k.startswith("mux_layer.0.")},
            "lacks compress.weight of layer 1",
        ),
        ({**_upstream_state(), "mux_layer.2.mux_layer.bias": torch.zeros(K)}, "has 3 layers; small has 2"),
        (
            {**_upstream_state(), "mux_layer.1.mux_layer.weight": torch.zeros(K, D)},
            "layer 1, compress.weight has the shape (4, 32)",
        ),
        ({**_upstream_state(), "encoder.weight": torch.zeros(1)}, "the key 'encoder.weight'"),
        ({**_upstream_state(), "epoch": 3}, "epoch is a int, not a tensor"),
        ([torch.zeros(1)], "holds a list, not a state dict"),
        ({}, "holds no tensors"),
        (
            {**_upstream_state(), "mux_layer.0.mux_layer.bias": torch.zeros(K, dtype=torch.complex64)},
            "is a tensor of torch.complex64",
        ),
        (
            {**_upstream_state(), "mux_layer.0.mux_layer.bias": torch.zeros(K).to_sparse()},
            "torch.sparse_coo on cpu",
        ),
        ({**_upstream_state(), "mux_layer.00.mux_layer.bias": torch.zeros(K)}, "the key 'mux_layer.00."),
        (
            {**_upstream_state(), "mux_layer.0.mux_layer.bias": torch.full((K,), float("nan"))},
            "layer 0, compress.bias holds values that are NaN",
        ),
    ],
)
def test_a_checkpoint_that_is_no_plugin_of_this_backbone_is_refused(
    tmp_path: Path, content: Any, expected: str
) -> None:
    with pytest.raises(UserError) as error:
        read_upstream(_save(tmp_path / "x.pkl", content), SIZE, BACKBONE)
    assert expected in error.value.message
    assert error.value.hint


def test_a_truncated_missing_or_too_large_file_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "k4.pkl", _upstream_state())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"is not a complete torch\.save file"):
        read_upstream(path, SIZE, BACKBONE)
    path.write_text("Dear sir or madam")
    with pytest.raises(UserError, match="Nothing in it was run"):
        read_upstream(path, SIZE, BACKBONE)
    with pytest.raises(UserError, match="There is no file"):
        read_upstream(tmp_path / "missing.pkl", SIZE, BACKBONE)
    large = {name: tensor * 1e6 for name, tensor in _upstream_state(torch.float32).items()}
    with pytest.raises(UserError, match="too large for float16"):
        read_upstream(_save(tmp_path / "large.pkl", large), SIZE, BACKBONE, "float16")


def test_the_command_writes_a_plugin_folder_and_keeps_what_is_there(
    tmp_path: Path, load_model: Callable[[str], Backbone]
) -> None:
    backbone = str(load_model("bert").info.source.folder)
    output = tmp_path / "plugin"
    arguments = ["import", str(_save(tmp_path / "k4.pkl", _upstream_state())), "--backbone", backbone]
    make_app()([*arguments, "--output", str(output)], standalone_mode=False)
    config = load_plugin(output).config
    assert (config.ratio, config.bottleneck_size, config.masking) == (K, M, "none")
    assert config.training is not None
    assert config.training["stage"] == "imported"
    before = (output / "plugin.safetensors").read_bytes()
    with pytest.raises(UserError, match="already exists") as error:
        make_app()([*arguments, "--output", str(output)], standalone_mode=False)
    assert error.value.hint is not None
    assert "--replace" in error.value.hint
    with pytest.raises(UserError, match="already exists and holds more than a plugin"):
        make_app()([*arguments, "--output", str(tmp_path), "--replace"], standalone_mode=False)
    make_app()(
        [*arguments, "--output", str(output), "--replace", "--dtype", "float32"], standalone_mode=False
    )
    assert (output / "plugin.safetensors").read_bytes() != before


@pytest.fixture
def whole_t5(minilm_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with a decoder, as the hub has T5."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "num_layers": 2}
    config = transformers.T5Config(vocab_size=30522, pad_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    copy_tokenizer(minilm_folder, tmp_path / "t5")
    return tmp_path / "t5"


@pytest.mark.parametrize(
    "choice", [[], ["--architecture", "T5EncoderModel"], ["--task", "feature-extraction"]], ids=str
)
def test_whole_checkpoints_are_taken_as_they_are_or_by_their_encoder(
    whole_t5: Path, tmp_path: Path, choice: list[str]
) -> None:
    (tmp_path / "texts.txt").write_text("The ferry leaves at seven.\n\n" * 40)
    upstream = str(_save(tmp_path / "k4.pkl", _upstream_state()))
    training = "--text texts.txt --ratio 2 --bottleneck-size 4 --steps 1 --batch-size 2 --held-out-passages 2"
    for command in (
        ["import", upstream],
        ["train", "pretrain", *training.split(), "--max-tokens", "8"],
    ):
        arguments = [*command, "--backbone", str(whole_t5), "--output", command[0]]
        found = call(*arguments, *choice, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
    both = call(*arguments, "--replace", "--task", "a", "--architecture", "b", cwd=tmp_path)
    assert (both.returncode, "--task and --architecture were both given" in both.stderr) == (2, True)
