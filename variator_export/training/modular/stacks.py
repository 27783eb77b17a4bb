"""Assemblies as a training draws them: original layers and modules of each stack."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from variator_export.core.assembly import Span, Stack
from variator_export.model.augmented import run_backbone
from variator_export.model.backbone import Backbone, copy_sharing_weights
from variator_export.model.decoders.decoding import decoder_outputs
from variator_export.model.modular.assembled import layers_of, replace_layers

# A unit of an assembly: the layers that it stands for, and the module; None for an original layer.
Unit = tuple[Span, nn.Module | None]
# The units of each stack, in order.
Units = Mapping[Stack, Sequence[Unit]]


@dataclass(frozen=True)
class TrainedStack:
    """A stack, and the modules that are trained for it.

    Attributes:
        num_layers: Layers of the original.
        sets: The modules of each set, with the layers that they replace.
    """

    num_layers: int
    sets: tuple[tuple[tuple[Span, nn.Module], ...], ...] = ()

    def draw(self, generator: random.Random, probability: float) -> list[Unit]:
        """Draw layers: where a module begins, one is taken with a probability, each equally likely."""
        found: list[Unit] = []
        first = 0
        while first < self.num_layers:
            beginning: list[Unit] = [unit for units in self.sets for unit in units if unit[0].first == first]
            if beginning and generator.random() < probability:
                found.append(generator.choice(beginning))
            else:
                found.append((Span(first, first), None))
            first = found[-1][0].last + 1
        return found

    def whole(self, index: int | None) -> list[Unit]:
        """All modules of a set, and original layers where there are none; None for the original layers."""
        units: Iterable[tuple[Span, nn.Module]] = () if index is None else self.sets[index]
        covered: dict[int, Unit] = {span.first: (span, layer) for span, layer in units}
        found: list[Unit] = []
        first = 0
        while first < self.num_layers:
            found.append(covered.get(first, (Span(first, first), None)))
            first = found[-1][0].last + 1
        return found


def has_modules(units: Sequence[Unit]) -> bool:
    """Whether a stack has a module."""
    return any(module is not None for _, module in units)


class Student:
    """The model whose layers each step replaces.

    Args:
        backbone: The backbone, which stays as it is.
        modules: The modules of each stack, on the backbone's device.
        decodes: Whether the decoder of a backbone that generates text will run.
    """

    def __init__(
        self, backbone: Backbone, modules: Mapping[Stack, Sequence[nn.Module]], *, decodes: bool
    ) -> None:
        self._model = copy_sharing_weights(backbone.model).eval()
        own = backbone.with_model(self._model)
        self._layers = {stack: layers_of(own, stack) for stack in modules}
        self._original = {stack: list(layers) for stack, layers in self._layers.items()}
        # transformers reads hidden states and attention by hooks, which it installs once, in the first call,
        # on the layers that are there. So all are there in a first call, of which nothing is used.
        for stack, layers in self._layers.items():
            replace_layers(layers, [*self._original[stack], *modules[stack]])
        ones = torch.ones((1, 2), dtype=torch.int64, device=next(self._model.parameters()).device)
        inputs = dict.fromkeys(backbone.spec.family.inputs, ones)
        with torch.no_grad():
            found = run_backbone(
                self._model, backbone.spec, None, inputs, {}, hidden_states=True, attentions=True
            )
            if decodes:
                # A text of padding alone has no first token (mBART).
                labels = ones + 1 if backbone.pad_token_id == 1 else ones
                states = found["last_hidden_state"]
                decoder_outputs(self._model, states, ones, labels, layers=True, attentions=True)

    def with_layers(self, units: Units) -> nn.Module:
        """The model with the layers of an assembly, until the next call."""
        for stack, layers in self._layers.items():
            chosen = [
                self._original[stack][span.first] if module is None else module
                for span, module in units[stack]
            ]
            replace_layers(layers, chosen)
        return self._model
