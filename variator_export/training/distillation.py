"""Distillation: plugins in a frozen backbone learn to reproduce its outputs without plugins."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from variator_export.core.errors import UserError
from variator_export.model.augmented import HIDDEN_STATES_PREFIX, AugmentedModel, PlainModel
from variator_export.model.backbone import Backbone
from variator_export.model.decoders.decoding import DECODER_STATES, decoder_outputs
from variator_export.model.plugin import CompressionPlugin
from variator_export.training import losses
from variator_export.training.settings import Losses
from variator_export.training.trained_module import TrainedModule


class Distillation(TrainedModule):
    """Plugins of several ratios that share the forward pass of one teacher.

    Only the plugins are registered as parameters of this module. Checkpoints therefore hold nothing else, and
    the frozen networks never leave evaluation mode.

    Args:
        backbone: The backbone, on the device to train on.
        plugins: The plugins by variant name. Parameters that do not require gradients stay unchanged.
        weights: Weights of the terms of the loss.

    Raises:
        UserError: The backbone lacks an output that a term of the loss needs.
    """

    def __init__(self, backbone: Backbone, plugins: Mapping[str, CompressionPlugin], weights: Losses) -> None:
        super().__init__()
        check_losses(backbone, weights)
        self.plugins = nn.ModuleList(plugins.values())
        self.weights = weights
        self.metric_names = tuple(plugins)
        self.num_loss_metrics = len(plugins)
        self.clipped = tuple(plugins.values())
        self.num_layers = backbone.info.size.num_layers
        self.decodes = needs_right_text(backbone, weights)
        # `object.__setattr__` keeps the frozen networks from being registered (see the class docstring).
        networks = {name: AugmentedModel(backbone, plugin) for name, plugin in plugins.items()}
        object.__setattr__(self, "teacher", PlainModel(backbone).eval())
        object.__setattr__(self, "students", networks)

    teacher: PlainModel
    students: dict[str, AugmentedModel]

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            labels: Class indices (B,), for the loss term `label`; of a backbone that generates text, the
                tokens of the target text (B, T), with -100 for padding.
            inputs: int64 (B, S), by the backbone's input names.

        Returns:
            `loss`: the mean over the rows, summed over the plugins. Each plugin depends only on its own loss.
            `metrics`: the loss of each row and plugin, (B, number of plugins), without gradient.
        """
        with torch.no_grad():
            expected = self._outputs(self.teacher, inputs, labels)
        each = [
            self._loss(self._outputs(model, inputs, labels), expected, inputs["attention_mask"], labels)
            for model in self.students.values()
        ]
        stacked = torch.stack(each, dim=-1)
        return {"loss": stacked.mean(0).sum(), "metrics": stacked.detach()}

    def _outputs(
        self, model: AugmentedModel | PlainModel, inputs: dict[str, Tensor], labels: Tensor | None
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = model(inputs, hidden_states=True)
        if not self.decodes:
            return found
        assert labels is not None
        states, mask = found["last_hidden_state"], inputs["attention_mask"]
        return found | decoder_outputs(model.transformer, states, mask, labels)

    def _loss(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], mask: Tensor, labels: Tensor | None
    ) -> Tensor:
        names = [f"{HIDDEN_STATES_PREFIX}{layer}" for layer in range(self.num_layers)]
        weights = self.weights
        total = mask.new_zeros(mask.shape[0], dtype=torch.float32)
        if weights.hidden:
            total = total + weights.hidden * losses.hidden_loss(found[names[-1]], expected[names[-1]], mask)
        if weights.layers:
            others = [losses.relative_hidden_loss(found[n], expected[n], mask) for n in names[:-1]]
            total = total + weights.layers * torch.stack(others).mean(0)
        if weights.embedding:
            name = "sentence_embedding"
            total = total + weights.embedding * losses.embedding_loss(found[name], expected[name])
        return add_target_terms(total, weights, found, expected, labels, decodes=self.decodes)


def add_target_terms(
    total: Tensor,
    weights: Losses,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    labels: Tensor | None,
    *,
    decodes: bool,
) -> Tensor:
    """Add the terms `decoder`, `logits` and `label` to the loss of each row, (B,).

    Args:
        total: The other terms, (B,).
        weights: Weights of the terms.
        found: Outputs of the student.
        expected: Outputs of the teacher.
        labels: As for `Distillation.forward`.
        decodes: Whether the outputs are those of a decoder along a text. Each term is then a mean over its
            tokens.
    """

    def of_rows(distance: Tensor) -> Tensor:
        if not decodes:
            return distance
        assert labels is not None
        return losses.token_mean(distance, labels)

    if weights.decoder:
        assert labels is not None
        mask = labels != losses.IGNORED
        distance = losses.hidden_loss(found[DECODER_STATES], expected[DECODER_STATES], mask)
        total = total + weights.decoder * distance
    if weights.logits:
        total = total + weights.logits * of_rows(losses.logits_loss(found["logits"], expected["logits"]))
    if weights.label:
        assert labels is not None
        total = total + weights.label * of_rows(losses.label_loss(found["logits"], labels))
    return total


def needs_right_text(backbone: Backbone, weights: Losses) -> bool:
    """Whether the loss runs the decoder of a backbone that generates text, along the target text."""
    return backbone.spec.head.generates and any((weights.decoder, weights.logits, weights.label))


def check_losses(backbone: Backbone, weights: Losses) -> None:
    """Reject a term of the loss for which the backbone has no output."""
    source, name = backbone.info.source.name, backbone.spec.name
    if weights.embedding and backbone.pooling is None:
        raise UserError(
            f"The loss term embedding needs a sentence embedding; {source} declares no pooling.",
            "Choose other terms (--loss hidden=1), or add the files of sentence-transformers (modules.json).",
        )
    generates = backbone.spec.head.generates
    if weights.decoder and backbone.spec.head.label_words is not None:
        raise UserError(
            "With label words the loss has no term decoder.", "Use the terms logits or label instead."
        )
    if weights.decoder and not generates:
        raise UserError(
            f"The loss term decoder needs a decoder; {source} is a {name} without one.",
            "Leave the term out, or choose a checkpoint that generates text.",
        )
    for term in ("logits", "label"):
        has_logits = "logits" in backbone.spec.outputs and "logits" not in backbone.spec.token_outputs
        if getattr(weights, term) and not has_logits and not generates:
            raise UserError(
                f"The loss term {term} needs a classifier; {source} is a {name} without logits of each text.",
                "Leave the term out, or fine-tune a classifier first: variator-export train finetune",
            )
    if not any((weights.hidden, weights.embedding, weights.decoder, weights.logits, weights.label)):
        raise UserError(
            "The loss term layers covers every layer but the last, whose plugin would not be trained.",
            "Add a term that covers the last layer: --loss hidden=1 --loss layers=1",
        )
    if weights.layers and backbone.info.size.num_layers < 2:
        raise UserError(
            "The loss term layers covers every layer but the last; this backbone has only one layer.",
            "Leave the term out.",
        )
