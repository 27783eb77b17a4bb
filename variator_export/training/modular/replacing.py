"""Module replacing: modules take the place of layers of a frozen model, and learn to do their work."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from variator_export.core.assembly import ENCODER_STACK, Span
from variator_export.core.errors import UserError
from variator_export.model.augmented import ATTENTIONS_PREFIX, HIDDEN_STATES_PREFIX, run_backbone
from variator_export.model.backbone import Backbone, copy_sharing_weights
from variator_export.model.modular.assembled import layers_of
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.pooling import Pooling
from variator_export.training import losses
from variator_export.training.distillation import check_losses
from variator_export.training.modular.settings import ModuleLosses, Replacing
from variator_export.training.trained_module import TrainedModule

# A unit of an assembly: the layers that it stands for, and the module; None for an original layer.
Unit = tuple[Span, nn.Module | None]


class ModuleReplacing(TrainedModule):
    """Modules of several granularities that share a frozen model and its teacher's forward pass.

    Only the modules are registered as parameters. The metrics are those of one assembly for each set of
    modules: all of its modules, and original layers where it has none.

    Args:
        backbone: The backbone, on the device to train on.
        sets: For each name, the modules' configuration and the modules.
        weights: Weights of the terms of the loss.
        replacing: The schedule of the replacing.
        steps: Steps of the run.
        seed: Seed of the draws.

    Raises:
        UserError: The backbone lacks an output that a term of the loss needs.
    """

    uses_all_parameters = False

    def __init__(
        self,
        backbone: Backbone,
        sets: Mapping[str, tuple[ModuleConfig, Sequence[nn.Module]]],
        weights: ModuleLosses,
        replacing: Replacing,
        *,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_module_losses(backbone, weights)
        self.sets = nn.ModuleList(nn.ModuleList(layers) for _, layers in sets.values()).eval()
        self.weights, self.replacing, self.steps, self.seed = weights, replacing, steps, seed
        self.metric_names = tuple(sets)
        self.num_loss_metrics = len(sets)
        self.clipped = tuple(layer for layers in self.sets for layer in layers.children())
        self.num_layers = backbone.info.size.num_layers
        # In checkpoints, so that a run that goes on draws what an unbroken one draws.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.units: list[list[Unit]] = [
            [(group.span, layer) for group, layer in zip(config.modules, layers, strict=True)]
            for config, layers in sets.values()
        ]
        # `object.__setattr__` keeps the frozen networks from being registered.
        object.__setattr__(self, "backbone", backbone)
        object.__setattr__(self, "teacher", copy_sharing_weights(backbone.model).eval())
        object.__setattr__(self, "student", _Student(backbone, self.clipped))
        self.pooling = Pooling(backbone.pooling) if backbone.pooling else None

    step: Tensor
    backbone: Backbone
    teacher: nn.Module
    student: "_Student"

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            labels: Class indices (B,), for the loss term `label`.
            inputs: int64 (B, S), by the backbone's input names.

        Returns:
            `loss`: in training, of the assembly that the step drew; else summed over the assemblies of the
            metrics. A mean over the rows.
            `metrics`: of each row and assembly, (B, number of assemblies), without gradient.
        """
        with torch.no_grad():
            expected = self._run(self.teacher, inputs)
        if self.training:
            assemblies = [self.draw(int(self.step))]
            self.step += 1
        else:
            assemblies = [self.whole(index) for index in range(len(self.units))]
        each = [self._loss(units, expected, inputs, labels) for units in assemblies]
        stacked = torch.stack(each, dim=-1)
        return {"loss": stacked.mean(0).sum(), "metrics": stacked.detach()}

    def train(self, mode: bool = True) -> "ModuleReplacing":
        """Choose between the assembly of the step and those of the metrics. No layer ever has dropout."""
        self.training = mode
        return self

    def draw(self, step: int) -> list[Unit]:
        """The assembly of a step, with at least one module.

        It depends on the seed and the step alone, and so is the same in every process.
        """
        # A string, because tuples are not allowed as seeds; one hash of both numbers, not a sum.
        generator = random.Random(f"{self.seed}/{step}")
        probability = self.replacing.probability(step, self.steps)
        found: list[Unit] = []
        while not any(module is not None for _, module in found):
            found = self._draw(generator, probability)
        return found

    def _draw(self, generator: random.Random, probability: float) -> list[Unit]:
        found: list[Unit] = []
        first = 0
        while first < self.num_layers:
            beginning = [unit for units in self.units for unit in units if unit[0].first == first]
            if beginning and generator.random() < probability:
                found.append(generator.choice(beginning))
            else:
                found.append((Span(first, first), None))
            first = found[-1][0].last + 1
        return found

    def whole(self, index: int) -> list[Unit]:
        """The assembly with all modules of a set, and original layers where there are none."""
        covered = {span.first: (span, layer) for span, layer in self.units[index]}
        found: list[Unit] = []
        first = 0
        while first < self.num_layers:
            found.append(covered.get(first, (Span(first, first), None)))
            first = found[-1][0].last + 1
        return found

    def _run(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run_backbone(
            model,
            self.backbone.spec,
            self.pooling,
            dict(inputs),
            {},
            hidden_states=True,
            attentions=bool(self.weights.attention),
        )

    def _loss(
        self,
        units: Sequence[Unit],
        expected: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> Tensor:
        found = self._run(self.student.with_layers(units), inputs)
        mask, weights = inputs["attention_mask"], self.weights
        total = mask.new_zeros(mask.shape[0], dtype=torch.float32)
        last = len(units) - 1
        ends = [(place, span.last) for place, (span, module) in enumerate(units) if module is not None]
        if weights.hidden:
            pair = _states(found, last), _states(expected, self.num_layers - 1)
            total = total + weights.hidden * losses.hidden_loss(*pair, mask)
        if weights.layers and (inner := [pair for pair in ends if pair[0] < last]):
            each = [
                losses.relative_hidden_loss(_states(found, place), _states(expected, layer), mask)
                for place, layer in inner
            ]
            total = total + weights.layers * torch.stack(each).mean(0)
        if weights.attention and ends:
            each = [
                losses.attention_loss(_attention(found, place), _attention(expected, layer), mask)
                for place, layer in ends
            ]
            total = total + weights.attention * torch.stack(each).mean(0)
        if weights.embedding:
            name = "sentence_embedding"
            total = total + weights.embedding * losses.embedding_loss(found[name], expected[name])
        if weights.logits:
            total = total + weights.logits * losses.logits_loss(found["logits"], expected["logits"])
        if weights.label:
            assert labels is not None
            total = total + weights.label * losses.label_loss(found["logits"], labels)
        return total


def check_module_losses(backbone: Backbone, weights: ModuleLosses) -> None:
    """Reject a term of the loss that modules do not have, or that the backbone has no output for.

    Raises:
        UserError: There is such a term.
    """
    if backbone.spec.head.generates and any((weights.logits, weights.label, weights.decoder)):
        raise UserError(
            "Modules of a backbone that generates text are trained on the encoder's states alone.",
            "Choose from the terms hidden, layers and attention: --loss hidden=1 --loss layers=1",
        )
    if weights.decoder:
        raise UserError("The loss of modules has no term decoder.", "Leave it out.")
    # Each term covers every module that a step draws, or a later step does.
    check_losses(backbone, weights.model_copy(update={"layers": 0.0, "hidden": 1.0}))


class _Student:
    """The model whose layers each step replaces."""

    def __init__(self, backbone: Backbone, modules: Iterable[nn.Module]) -> None:
        self._model = copy_sharing_weights(backbone.model).eval()
        self._layers = layers_of(backbone.with_model(self._model), ENCODER_STACK)
        self._original = list(self._layers)
        # transformers reads hidden states and attention by hooks, which it installs once, in the first call,
        # on the layers that are there. So all are there in a first call, of which nothing is used.
        self._layers.extend(modules)
        ones = torch.ones((1, 2), dtype=torch.int64, device=next(self._model.parameters()).device)
        with torch.no_grad():
            run_backbone(
                self._model,
                backbone.spec,
                None,
                dict.fromkeys(backbone.spec.family.inputs, ones),
                {},
                hidden_states=True,
                attentions=True,
            )

    def with_layers(self, units: Sequence[Unit]) -> nn.Module:
        """The model with the layers of an assembly, until the next call."""
        chosen = [self._original[span.first] if module is None else module for span, module in units]
        del self._layers[:]
        self._layers.extend(chosen)
        return self._model


def _states(outputs: Mapping[str, Tensor], layer: int) -> Tensor:
    return outputs[f"{HIDDEN_STATES_PREFIX}{layer}"]


def _attention(outputs: Mapping[str, Tensor], layer: int) -> Tensor:
    return outputs[f"{ATTENTIONS_PREFIX}{layer}"]
