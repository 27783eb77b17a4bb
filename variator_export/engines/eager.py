"""The augmented model in eager PyTorch: the reference for numbers, and a baseline for speed."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from variator_export.core.axes import ENCODER_MASK, past_names, present_names
from variator_export.engines.base import Arrays
from variator_export.model.augmented import AugmentedModel, PlainModel
from variator_export.model.backbone import Backbone, quiet_transformers
from variator_export.model.decoders.decoding import DecoderStep, encoder_outputs
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.quantization.layers import GivenRounding, QuantizedLinear

if TYPE_CHECKING:  # code that runs only plugins needs no manifest
    from variator_export.bundle.files import BundleFiles
    from variator_export.bundle.manifest import Variant


class _SoftmaxInFloat64(TorchFunctionMode):
    """Keep a softmax in float64 where a model asks for float32 (ModernBERT).

    float32 raises the precision of a half-precision model, but lowers that of the float64 reference: the
    lowest float64 value, which masks a score, becomes -inf in float32, and a fully masked row becomes NaN.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.softmax, torch.nn.functional.softmax) and args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


# Integer types by bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class EagerModel:
    """A variant in eager PyTorch, in the backbone's type, on the CPU.

    Args:
        backbone: The loaded backbone; it is not changed.
        model: A plugin, None for the plain backbone, or a module as `Method.eager` returns it.
        attention: transformers' attention implementation. `eager` is the reference for numbers; `sdpa` is
            faster and the usual choice of users.
        compiled: Run the model through torch.compile, which compiles at the first call of each shape.

    Attributes:
        transformer: The inner transformers model, with the plugin installed.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: Plugin | nn.Module | None,
        *,
        attention: Literal["eager", "sdpa"] = "eager",
        compiled: bool = False,
    ) -> None:
        if isinstance(model, Plugin):
            model = AugmentedModel(backbone, CompressionPlugin.from_file(model).to(backbone.dtype))
        module = PlainModel(backbone) if model is None else model
        self._model = module
        self.transformer = cast(Any, module).transformer  # every module of a method has this attribute
        if attention == "sdpa":
            with quiet_transformers():  # families without a choice print a warning
                self.transformer.set_attn_implementation("sdpa")
        self._backbone = backbone
        self._precision: contextlib.AbstractContextManager[Any] = (
            _SoftmaxInFloat64() if backbone.dtype == torch.float64 else contextlib.nullcontext()
        )
        self._call: Any = torch.compile(self._model, dynamic=False) if compiled else self._model

    @classmethod
    def of_variant(
        cls,
        backbone: Backbone,
        bundle: "BundleFiles",
        variant: "Variant",
        *,
        attention: Literal["eager", "sdpa"] = "eager",
        compiled: bool = False,
    ) -> "EagerModel":
        """Load a variant of a bundle, after a check of the hashes of the variant's own files."""
        from variator_export.model.methods import method_of

        module = method_of(variant).eager(backbone, bundle.variant_files(variant))
        return cls(backbone, module, attention=attention, compiled=compiled)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once; int64 inputs (B, S)."""
        with torch.inference_mode(), self._precision:
            outputs = self._call({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: _numpy(value) for name, value in outputs.items()}

    @contextlib.contextmanager
    def rounded_otherwise(self, seed: int) -> Iterator[None]:
        """Move weights to a neighbouring number, and back at the end of the block.

        Each weight moves up or down by one unit of its type with a probability of 1/24 each: the variance is
        that of rounding, 1/12 of a squared unit. What a model makes of that is as much as its rounding error,
        but independent of it.
        """
        generator = torch.Generator().manual_seed(seed)
        parameters = [p for p in self._model.parameters() if p.is_floating_point()]
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter in parameters:
                drawn = torch.rand(parameter.shape, generator=generator)
                step = (drawn < 1 / 24).int() - (drawn > 23 / 24).int()
                bits = parameter.data.view(_BITS[parameter.dtype.itemsize])  # neighbours are neighbours there
                bits += step.to(bits.dtype) * (parameter.data != 0)
            yield
        finally:
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.data.copy_(before)

    def scores(self, inputs: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        """Scores of the next token after each of the given ones, of a model that generates text.

        Args:
            inputs: int64 inputs of the encoder (B, S).
            tokens: int64 (B, T), the start token first.

        Returns:
            (B, T, V).
        """
        with torch.inference_mode(), self._precision:
            found = self.transformer(
                **self._encoded(inputs), decoder_input_ids=torch.from_numpy(tokens), use_cache=False
            )
        return _numpy(found.logits)

    def generate(self, inputs: Mapping[str, np.ndarray], **settings: Any) -> np.ndarray:
        """Tokens that transformers' own `generate` gives, int64 (B, longest), the start token first.

        Args:
            inputs: int64 inputs of the encoder (B, S).
            **settings: Settings of transformers' `GenerationConfig`.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        with torch.inference_mode(), self._precision, quiet_transformers():
            ids = torch.from_numpy(inputs["input_ids"])
            # transformers gives the cache as many layers as the encoder, where it should ask the decoder.
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            found = self.transformer.generate(ids, **self._encoded(inputs), **settings, past_key_values=cache)
        return np.asarray(found.numpy())

    def decoder_step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Take one token as the decoder's graph does, of a model that generates text.

        Args:
            inputs: The inputs of the decoder's graph, by name; keys and values in any floating-point type.

        Returns:
            The graph's outputs, by name.
        """
        layers = sum(name.endswith(".decoder.key") for name in inputs)
        own, cross = (
            [self._cached(inputs[name]) for name in past_names(layers, stack)]
            for stack in ("decoder", "encoder")
        )
        mask, ids = (torch.from_numpy(inputs[name]) for name in (ENCODER_MASK, "input_ids"))
        with torch.inference_mode(), self._precision:
            found = DecoderStep(self.transformer)(mask, ids, own, cross)
        return {
            name: _numpy(value)
            for name, value in zip(("logits", *present_names(layers, "decoder")), found, strict=True)
        }

    def _cached(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).to(self._backbone.dtype)

    def _encoded(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The encoder's states with the plugin, and the mask, as transformers' models take them."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        states = self._call(tensors)["last_hidden_state"]
        return {
            "encoder_outputs": encoder_outputs(states),
            "attention_mask": tensors["attention_mask"],
        }

    @functools.cached_property
    def _quantized_layers(self) -> dict[str, QuantizedLinear]:
        """The quantised layers, of the backbone and of modules, by the name of their weight in graphs."""
        names = {id(buffer): name for name, buffer in self._backbone.model.named_buffers()}
        names |= getattr(self._model, "module_buffers", {})
        found = [module for module in self.transformer.modules() if isinstance(module, QuantizedLinear)]
        return {names[id(layer.weight)]: layer for layer in found}

    def run_with_rounding(
        self, inputs: Mapping[str, np.ndarray], rounded: Mapping[str, Sequence[np.ndarray]]
    ) -> tuple[Arrays, dict[str, list[np.ndarray]]]:
        """Run a quantised model once, with given values instead of its own rounding of activations.

        Args:
            inputs: int64 inputs (B, S).
            rounded: The rounded activations of each call of each quantised layer, by the name of the layer's
                weight.

        Returns:
            The outputs; and the activations of each call, divided by their scale, before they would have been
            rounded, by the name of the layer's weight.
        """
        layers = self._quantized_layers
        given = {name: GivenRounding(map(torch.from_numpy, rounded[name])) for name in layers}
        try:
            for name, layer in layers.items():
                layer.given = given[name]
            outputs = self.run(inputs)
        finally:
            for layer in layers.values():
                layer.given = None
        return outputs, {name: [_numpy(a) for a in found.activations] for name, found in given.items()}


def _numpy(value: torch.Tensor) -> np.ndarray:
    """Convert to numpy, half precision to float32, which graphs return too."""
    return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
