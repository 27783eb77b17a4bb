"""Module replacing: modules take the place of layers of a frozen model, and learn to do their work."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Stack
from variator_export.core.errors import UserError
from variator_export.model.augmented import ATTENTIONS_PREFIX, HIDDEN_STATES_PREFIX, run_backbone
from variator_export.model.backbone import Backbone, copy_sharing_weights
from variator_export.model.decoders.decoding import (
    CROSS_ATTENTIONS,
    DECODER_ATTENTIONS,
    DECODER_STATES,
    decoder_outputs,
)
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.pooling import Pooling
from variator_export.training import losses
from variator_export.training.distillation import add_target_terms, check_losses, needs_right_text
from variator_export.training.modular.settings import ModuleLosses, Replacing
from variator_export.training.modular.stacks import Student, TrainedStack, Unit, Units, has_modules
from variator_export.training.trained_module import TrainedModule

# The modules of each set, by the set's name.
Sets = Mapping[str, tuple[ModuleConfig, Sequence[nn.Module]]]


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
        sets: Sets,
        weights: ModuleLosses,
        replacing: Replacing,
        *,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        stacks = [config.stack for config, _ in sets.values()]
        check_module_losses(backbone, weights, stacks)
        self.sets = nn.ModuleList(nn.ModuleList(layers) for _, layers in sets.values()).eval()
        # The student runs them beside the backbone's own layers before the Trainer moves anything.
        self.sets.to(next(backbone.model.parameters()).device)
        self.weights, self.replacing, self.steps, self.seed = weights, replacing, steps, seed
        self.metric_names = tuple(sets)
        self.num_loss_metrics = len(sets)
        self.clipped = tuple(layer for layers in self.sets for layer in layers.children())
        self.decodes = needs_right_text(backbone, weights)
        # In checkpoints, so that a run that goes on draws what an unbroken one draws.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.stacks = {
            stack: TrainedStack(
                num_layers,
                tuple(
                    tuple((group.span, layer) for group, layer in zip(config.modules, layers, strict=True))
                    for config, layers in sets.values()
                    if config.stack == stack
                ),
            )
            for stack, num_layers in backbone.info.stack_layers.items()
        }
        # The stack of each set, and its place among those of the stack.
        self.places = [(stack, stacks[:index].count(stack)) for index, stack in enumerate(stacks)]
        modules = {
            stack: [layer for units in own.sets for _, layer in units] for stack, own in self.stacks.items()
        }
        # `object.__setattr__` keeps the frozen networks from being registered.
        object.__setattr__(self, "backbone", backbone)
        object.__setattr__(self, "teacher", copy_sharing_weights(backbone.model).eval())
        object.__setattr__(self, "student", Student(backbone, modules, decodes=self.decodes))
        self.pooling = Pooling(backbone.pooling) if backbone.pooling else None

    step: Tensor
    backbone: Backbone
    teacher: nn.Module
    student: Student

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            labels: Class indices (B,), for the loss term `label`; of a backbone that generates text, the
                tokens of the target text (B, T), with -100 for padding.
            inputs: int64 (B, S), by the backbone's input names.

        Returns:
            `loss`: in training, of the assembly that the step drew; else summed over the assemblies of the
            metrics. A mean over the rows.
            `metrics`: of each row and assembly, (B, number of assemblies), without gradient.
        """
        with torch.no_grad():
            expected = self._encoded(self.teacher, inputs)
            if self.decodes:
                expected |= self._decoded(self.teacher, expected, inputs, labels)
        if self.training:
            assemblies = [self.draw(int(self.step))]
            self.step += 1
        else:
            assemblies = [self.whole(index) for index in range(len(self.places))]
        each = [self._loss(units, expected, inputs, labels) for units in assemblies]
        stacked = torch.stack(each, dim=-1)
        return {"loss": stacked.mean(0).sum(), "metrics": stacked.detach()}

    def train(self, mode: bool = True) -> "ModuleReplacing":
        """Choose between the assembly of the step and those of the metrics. No layer ever has dropout."""
        self.training = mode
        return self

    def draw(self, step: int) -> Units:
        """The assembly of a step, with at least one module.

        It depends on the seed and the step alone, and so is the same in every process.
        """
        # A string, because tuples are not allowed as seeds; one hash of both numbers, not a sum.
        generator = random.Random(f"{self.seed}/{step}")
        probability = self.replacing.probability(step, self.steps)
        found: dict[Stack, list[Unit]] = {}
        while not any(map(has_modules, found.values())):
            found = {stack: own.draw(generator, probability) for stack, own in self.stacks.items()}
        return found

    def whole(self, index: int) -> Units:
        """The assembly with all modules of a set, and original layers where there are none."""
        whose, place = self.places[index]
        return {stack: own.whole(place if stack == whose else None) for stack, own in self.stacks.items()}

    def _encoded(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run_backbone(
            model,
            self.backbone.spec,
            self.pooling,
            dict(inputs),
            {},
            hidden_states=True,
            attentions=bool(self.weights.attention),
        )

    def _decoded(
        self,
        model: Any,
        encoded: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        assert labels is not None
        return decoder_outputs(
            model,
            encoded["last_hidden_state"],
            inputs["attention_mask"],
            labels,
            layers=True,
            attentions=bool(self.weights.attention),
        )

    def _loss(
        self,
        units: Units,
        expected: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> Tensor:
        model = self.student.with_layers(units)
        # With the original layers, the encoder computes what the teacher's has computed.
        found = dict(expected)
        if has_modules(units[ENCODER_STACK]):
            found |= self._encoded(model, inputs)
        if self.decodes:
            found |= self._decoded(model, found, inputs, labels)
        mask, weights = inputs["attention_mask"], self.weights
        total = mask.new_zeros(mask.shape[0], dtype=torch.float32)
        if has_modules(units[ENCODER_STACK]):
            if weights.hidden:
                student = found[f"{HIDDEN_STATES_PREFIX}{len(units[ENCODER_STACK]) - 1}"]
                teacher = expected[f"{HIDDEN_STATES_PREFIX}{self.stacks[ENCODER_STACK].num_layers - 1}"]
                total = total + weights.hidden * losses.hidden_loss(student, teacher, mask)
            total = total + self._of_modules(
                units[ENCODER_STACK], found, expected, mask, HIDDEN_STATES_PREFIX, (ATTENTIONS_PREFIX,)
            )
            if weights.embedding:
                name = "sentence_embedding"
                total = total + weights.embedding * losses.embedding_loss(found[name], expected[name])
        if has_modules(units.get(DECODER_STACK, ())):
            assert labels is not None
            attentions = f"{DECODER_ATTENTIONS}.", f"{CROSS_ATTENTIONS}."
            total = total + self._of_modules(
                units[DECODER_STACK],
                found,
                expected,
                labels != losses.IGNORED,
                f"{DECODER_STATES}.",
                attentions,
            )
        return add_target_terms(total, weights, found, expected, labels, decodes=self.decodes)

    def _of_modules(
        self,
        units: Sequence[Unit],
        found: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        mask: Tensor,
        states: str,
        attentions: Sequence[str],
    ) -> Tensor:
        """The terms of each module of a stack: states at the ends of all but the last layer, and attention.

        Args:
            units: The layers of the stack.
            found: Outputs of the student.
            expected: Outputs of the teacher.
            mask: 1 for tokens that count, (B, tokens).
            states: Prefix of the states' names.
            attentions: Prefixes of the names of attentions.
        """
        total = mask.new_zeros(mask.shape[0], dtype=torch.float32)
        ends = [(place, span.last) for place, (span, module) in enumerate(units) if module is not None]
        if self.weights.layers and (inner := [pair for pair in ends if pair[0] < len(units) - 1]):
            each = [
                losses.relative_hidden_loss(found[f"{states}{place}"], expected[f"{states}{layer}"], mask)
                for place, layer in inner
            ]
            total = total + self.weights.layers * torch.stack(each).mean(0)
        if self.weights.attention and ends:
            each = [
                losses.attention_loss(found[f"{name}{place}"], expected[f"{name}{layer}"], mask)
                for place, layer in ends
                for name in attentions
            ]
            total = total + self.weights.attention * torch.stack(each).mean(0)
        return total


def check_module_losses(backbone: Backbone, weights: ModuleLosses, stacks: Sequence[Stack]) -> None:
    """Reject a term of the loss that the backbone has no output for, and modules that no term covers.

    Args:
        backbone: The backbone.
        weights: Weights of the terms of the loss.
        stacks: The stacks that modules are trained for.

    Raises:
        UserError: There is one.
    """
    if DECODER_STACK in stacks and not needs_right_text(backbone, weights):
        raise UserError(
            "Modules of the decoder need a term of the loss that runs the decoder: decoder, logits or label.",
            "Add one: --loss decoder=1 --loss logits=1",
        )
    # Each term covers every module that a step draws, or a later step does.
    check_losses(backbone, weights.model_copy(update={"layers": 0.0, "hidden": 1.0}))
