"""The compression plugin computes what the paper's code computes (arXiv 2310.15724)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import plugin_for

from variator_export.engines.eager import EagerModel
from variator_export.model.augmented import AugmentedModel
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import (
    CompressionLayer,
    CompressionPlugin,
    DecompressionLayer,
    initialise_plugin,
)
from variator_export.model.plugin_layout import expected_shapes, null_plugin, stack_for_graph


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _compression_layer(ratio: int, hidden_size: int) -> CompressionLayer:
    layer = CompressionLayer(ratio, hidden_size)
    layer.load_state_dict({"weight": _random(ratio, ratio * hidden_size), "bias": _random(ratio)})
    return layer


def test_compression_is_a_softmax_weighted_sum_of_the_window() -> None:
    k, d = 3, 5
    layer, x = _compression_layer(k, d), _random(2, 4, k, d)
    found = layer(x)
    for b in range(2):
        for w in range(4):
            scores = layer.weight @ torch.cat(list(x[b, w])) + layer.bias
            weights = torch.exp(scores) / torch.exp(scores).sum()
            expected = sum(weights[i] * x[b, w, i] for i in range(k))
            torch.testing.assert_close(found[b, w], expected)


def test_padding_takes_no_part_where_it_is_excluded() -> None:
    k, d = 4, 5
    layer, x = _compression_layer(k, d), _random(1, 2, k, d)
    keep = torch.tensor([[[True, True, False, False], [False] * k]])
    found = layer(x, keep)
    changed = torch.where(keep.unsqueeze(-1), x, torch.full((), 100.0))
    torch.testing.assert_close(layer(changed, keep), found)
    assert torch.equal(found[0, 1], torch.zeros(d)), "a window of padding gives zeros, not NaN"
    scores = layer.weight @ torch.cat([x[0, 0, 0], x[0, 0, 1], torch.zeros(2 * d)]) + layer.bias
    weights = torch.softmax(scores[:2], 0)
    torch.testing.assert_close(found[0, 0], weights[0] * x[0, 0, 0] + weights[1] * x[0, 0, 1])


def test_decompression_is_the_formula_of_the_paper() -> None:
    k, d, m = 3, 5, 2
    layer = DecompressionLayer(d, m)
    y, x = _random(2, 4, d), _random(2, 4, k, d)
    found = layer(y, x)
    for i in range(k):
        down = layer.down.weight @ torch.cat([y[1, 2], x[1, 2, i]]) + layer.down.bias
        expected = y[1, 2] + layer.up.weight @ torch.tanh(down) + layer.up.bias
        torch.testing.assert_close(found[1, 2, i], expected)


def test_the_split_form_of_the_decompression_is_equal() -> None:
    layer, y, x = DecompressionLayer(16, 4), _random(2, 4, 16), _random(2, 4, 3, 16)
    torch.testing.assert_close(layer(y, x, split=True), layer(y, x))


def test_initialisation_is_that_of_the_paper() -> None:
    k, d, m = 4, 128, 64
    plugin = initialise_plugin(k, d, 3, bottleneck_size=m, seed=1)
    for name, tensor in plugin.tensors.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        else:
            std = math.sqrt(2 / (d * k)) if name.endswith("compress.weight") else 0.01
            assert tensor.std() == pytest.approx(std, rel=0.05), name
            assert abs(tensor.mean()) < std / 10, name
    again = initialise_plugin(k, d, 3, bottleneck_size=m, seed=1)
    other = initialise_plugin(k, d, 3, bottleneck_size=m, seed=2)
    name = "layers.0.compress.weight"
    assert np.array_equal(plugin.tensors[name], again.tensors[name])
    assert not np.array_equal(plugin.tensors[name], other.tensors[name])


def test_modules_have_the_names_and_shapes_of_the_file() -> None:
    plugin = initialise_plugin(4, 16, 2, bottleneck_size=6)
    state = CompressionPlugin(plugin.config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(plugin.config)


def test_stacked_inputs_of_a_graph_have_the_compression_weight_by_slots() -> None:
    plugin = initialise_plugin(4, 16, 2, bottleneck_size=6)
    inputs = stack_for_graph(plugin)
    assert inputs["plugin.compress.weight"].shape == (2, 4, 4, 16)
    first = plugin.tensors["layers.0.compress.weight"].reshape(4, 4, 16)
    assert np.array_equal(inputs["plugin.compress.weight"][0], first)
    assert inputs["plugin.exclude_padding"].shape == (1,)


def _inputs(backbone: Backbone, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 30000, (batch, length), generator=torch.Generator().manual_seed(length))
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: values[name] for name in backbone.spec.family.inputs}


@pytest.mark.parametrize("model", ["bert", "t5-v1.0", "t5-v1.1"])
def test_a_null_plugin_leaves_the_backbone_as_it_is(
    load_model: Callable[[str], Backbone], model: str
) -> None:
    backbone = load_model(model)
    size = backbone.info.size
    null = null_plugin(size.num_layers, size.hidden_size)
    inputs = {name: tensor.numpy() for name, tensor in _inputs(backbone, 2, 9).items()}
    expected = EagerModel(backbone, None).run(inputs)["last_hidden_state"]
    found = EagerModel(backbone, null).run(inputs)["last_hidden_state"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_pad_token_decides_what_is_mixed_into_the_last_window(
    load_model: Callable[[str], Backbone],
) -> None:
    """Masking `none`, as in the paper's code: padding takes part, so its id matters."""
    backbone = load_model("bert")
    inputs = _inputs(backbone, 1, 5)

    def run(pad_token_id: int, masking: str) -> torch.Tensor:
        plugin = CompressionPlugin.from_file(plugin_for(backbone, 4, masking=masking))
        other = Backbone(backbone.info, backbone.model, pad_token_id)
        return AugmentedModel(other, plugin)(inputs)["last_hidden_state"]

    assert (run(0, "none") - run(7, "none")).abs().max() > 1e-3
    torch.testing.assert_close(run(0, "exclude-padding"), run(7, "exclude-padding"))
