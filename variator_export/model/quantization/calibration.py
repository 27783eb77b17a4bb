"""Calibration: scales and smoothing factors of a model's linear layers, found on texts.

The factor of channel c is max|x_c|^-a * max|w_c|^(1-a), as in SmoothQuant (arXiv 2211.10438). Each layer
tries some exponents a and takes the one whose quantised product is closest to the exact product. Layers that
read one input, such as query, key and value, are calibrated together.

The model is calibrated at ratio 1. A plugin's compressed vectors are close to averages of its windows, so
they are in the range of what they replace, and all ratios share the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from variator_export.core.errors import UserError
from variator_export.core.precision import Precision
from variator_export.model.quantization.layers import TINY
from variator_export.model.quantization.static import INT8, LayerScales, StaticLinear, format_of, stored_scale

# Exponents a to try. 0 means no smoothing.
_EXPONENTS = (0.0, 0.5, 0.7, 0.85)
# Room above the largest activation of the texts. Other texts have larger ones, and saturated activations cost
# more than coarse ones: without it, the least cosine of MiniLM's embeddings falls from 0.89 to 0.85.
_HEADROOM = 1.25
# Activations of each layer's input that are kept to compare products.
_MOST_ROWS = 2048
# The smallest channel that counts, as a share of the largest one.
_SMALLEST_CHANNEL = 1e-4
_SEED = 0
_SCALE, _SMOOTHING = "input_scale", "smoothing"


@dataclass(frozen=True)
class Calibration:
    """Scales of all linear layers of an encoder, float32, by the name of the layer."""

    layers: Mapping[str, LayerScales]

    def in_type(self, dtype: torch.dtype) -> dict[str, LayerScales]:
        """The scales in another type. Layers with equal scales share the tensors."""
        shared: dict[tuple[bytes, bytes], LayerScales] = {}
        found = {}
        for name, scales in self.layers.items():
            smoothing = scales.smoothing
            key = (_bytes(scales.input_scale), b"" if smoothing is None else _bytes(smoothing))
            if key not in shared:
                shared[key] = LayerScales(
                    stored_scale(scales.input_scale, dtype),
                    None if smoothing is None else stored_scale(smoothing, dtype),
                )
            found[name] = shared[key]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that files give them, the inverse of `load_calibration`."""
        found = {}
        for name, scales in self.layers.items():
            # Copies: safetensors refuses tensors that share memory.
            found[f"{name}.{_SCALE}"] = scales.input_scale.clone()
            if scales.smoothing is not None:
                found[f"{name}.{_SMOOTHING}"] = scales.smoothing.clone()
        return found


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        UserError: The file cannot be read, or holds a scale that is not positive.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The calibration {path} cannot be read: {error}.", "Build the bundle again."
        ) from error
    if not tensors or not all(((t > 0) & torch.isfinite(t)).all() for t in tensors.values()):
        raise UserError(
            f"The calibration {path} has scales that are not positive.", "Build the bundle again."
        )
    names = [name.removesuffix(f".{_SCALE}") for name in tensors if name.endswith(f".{_SCALE}")]
    return Calibration(
        {n: LayerScales(tensors[f"{n}.{_SCALE}"], tensors.get(f"{n}.{_SMOOTHING}")) for n in names}
    )


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    texts: Sequence[Mapping[str, np.ndarray]],
    precision: Precision,
    progress: Callable[[], None] = lambda: None,
) -> Calibration:
    """Find the scales of linear layers.

    Args:
        model: The model in float32.
        layers: Its linear layers by name.
        texts: Inputs (1, S) of the model, without padding: one text each.
        precision: The precision to calibrate for.
        progress: Called after each text and for each layer.

    Raises:
        UserError: A layer never ran, or an activation is not finite.
    """
    inputs = _observe(model, layers, texts, progress)
    if missing := sorted(layers.keys() - {name for group in inputs for name in group.names}):
        raise UserError(
            f"The calibration texts never reach the layer {missing[0]}.", "Give more texts, or longer ones."
        )
    found: dict[str, LayerScales] = {}
    for group in inputs:
        if not torch.isfinite(group.largest).all():
            raise UserError(
                f"An activation of {group.names[0]} is not finite.", "The backbone's weights are damaged."
            )
        with torch.no_grad():
            scales = _choose(group, [layers[name].weight for name in group.names], precision)
        found |= dict.fromkeys(group.names, scales)
        for _ in group.names:
            progress()
    return Calibration({name: found[name] for name in layers})


def saturated_share(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    texts: Sequence[Mapping[str, np.ndarray]],
    calibration: Calibration,
    precision: Precision,
) -> tuple[str, float]:
    """The layer that saturates most on some texts, and the share of tokens with a saturated activation.

    Args: As for `calibrate`; the texts are other texts than those of the calibration.
    """
    worst = ("", 0.0)
    for group in _observe(model, layers, texts, lambda: None):
        scales = calibration.layers[group.names[0]]
        rows = group.rows if scales.smoothing is None else group.rows * scales.smoothing
        limit = scales.input_scale * format_of(precision).largest
        share = float((rows.abs().amax(dim=1) > limit).float().mean())
        worst = max(worst, (group.names[0], share), key=lambda found: found[1])
    return worst


@dataclass
class _Input:
    """What layers that read one input read.

    Attributes:
        names: Names of the layers.
        largest: float (in,); the largest absolute value of each channel.
        rows: float (rows, in); a sample of the activations.
    """

    names: list[str]
    largest: Tensor
    rows: Tensor


def _observe(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    texts: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[], None],
) -> list[_Input]:
    generator = torch.Generator().manual_seed(_SEED)
    per_text = max(1, _MOST_ROWS // len(texts))
    samples: dict[str, list[Tensor]] = {}
    largest: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {}
    # The input of the layer before, and the first layer that read it.
    last: tuple[Tensor, str] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal last
            x = arguments[0]
            if last is not None and last[0] is x:
                if name not in readers[last[1]]:
                    readers[last[1]].append(name)
                return
            last = x, name
            readers.setdefault(name, [name])
            vectors = x.reshape(-1, x.shape[-1])
            chosen = torch.randperm(len(vectors), generator=generator)[:per_text]
            samples.setdefault(name, []).append(vectors[chosen].clone())
            maximum = vectors.abs().amax(dim=0)
            largest[name] = torch.maximum(largest[name], maximum) if name in largest else maximum

        return observe

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for text in texts:
                last = None
                model(**{name: torch.from_numpy(array) for name, array in text.items()})
                progress()
    finally:
        for handle in hooks:
            handle.remove()
    return [_Input(names, largest[lead], torch.cat(samples[lead])) for lead, names in readers.items()]


def _choose(group: _Input, weights: Sequence[Tensor], precision: Precision) -> LayerScales:
    """Choose the exponent whose quantised product is closest to the exact one."""
    kind = format_of(precision)
    # Channels that are nearly always zero would get factors that float16 does not hold.
    activations = group.largest.clamp_min(float(group.largest.max()) * _SMALLEST_CHANNEL).clamp_min(TINY)
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    exact = [group.rows @ weight.float().T for weight in weights]
    candidates = []
    for exponent in _EXPONENTS if kind is INT8 else _EXPONENTS[:1]:
        smoothing = None
        if exponent:
            smoothing = (
                columns.clamp_min(float(columns.max()) * _SMALLEST_CHANNEL).clamp_min(TINY) ** (1 - exponent)
                / activations**exponent
            )
            smoothing = smoothing / smoothing.log().mean().exp()  # factors around 1 fit float16
        largest = group.largest if smoothing is None else group.largest * smoothing
        scale = largest.max().clamp_min(TINY) * _HEADROOM / kind.largest
        scales = LayerScales(scale, smoothing)
        error = sum(
            float(((StaticLinear(weight, None, scales, precision)(group.rows) - product) ** 2).sum())
            for weight, product in zip(weights, exact, strict=True)
        )
        candidates.append((error, exponent, scales))
    return min(candidates, key=lambda found: found[:2])[2]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().numpy().tobytes())
