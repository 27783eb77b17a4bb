"""Pre-training, stage one of the paper: training plugins for a pretrained backbone on unlabelled text."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.data.texts import TextSource
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_layout import PluginConfig
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.batches import collate_items
from variator_export.training.distillation import needs_right_text
from variator_export.training.given_plugins import GivenPlugins, leave_out_decompression, load_given
from variator_export.training.passages import Passages, describe_texts, tokenize_documents
from variator_export.training.plugin_run import train_plugins
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation, PassageSettings, PluginShape

# The share of tokens that T5's own training leaves out (arXiv 1910.10683, 3.1.4), as the paper's authors do.
T5_CORRUPTION = 0.15


def fit_preset(
    backbone: Backbone, losses: Losses, passages: PassageSettings, *, with_decoder: bool = True
) -> tuple[Losses, PassageSettings]:
    """Fit a preset to a backbone.

    A model without sentence embeddings has no term for them. Of T5, which has tokens for spans that are left
    out, the decoder's states count as much as the encoder's, as in the paper, unless `with_decoder` is False.
    """
    if losses.embedding and backbone.pooling is None:
        losses = losses.model_copy(update={"embedding": 0.0})
    if (
        with_decoder
        and backbone.spec.head.generates
        and TextEncoder(backbone.info.source.folder).sentinel_ids()
    ):
        losses = losses.model_copy(update={"decoder": 1.0})
        if not passages.corruption:
            passages = passages.model_copy(update={"corruption": T5_CORRUPTION})
    return losses, passages


def pretrain(
    backbone: Backbone,
    texts: Sequence[TextSource],
    run: Run,
    *,
    plugins: PluginShape | Mapping[str, Path],
    losses: Losses,
    passages: PassageSettings,
    optimisation: Optimisation,
) -> TrainedFolders:
    """Train plugins on plain text, all in one run. The results are published as OUTPUT/NAME.

    Args:
        backbone: The teacher, into which the plugins are also inserted. Its weights are not changed.
        texts: Plain text.
        run: The training run, which says where the plugins are published.
        plugins: The shape of new plugins, one for each ratio and named ratio-K; or the folders of plugins to
            train further, by name.
        losses: Weights of the terms of the loss.
        passages: Settings for cutting text into passages.
        optimisation: Settings of the optimizer.

    Raises:
        UserError: The text is too short, passages are longer than the backbone allows, a plugin does not fit
            the backbone, or the output or the losses are not suitable; see also `train_plugins`.
    """
    run.check_output()  # before the text is tokenized
    check_targets_of_text(backbone, losses, passages)
    given = (
        _new(backbone, plugins, optimisation.seed)
        if isinstance(plugins, PluginShape)
        else load_given(plugins, backbone)
    )
    highest = max(plugin.config.ratio for plugin in given.modules.values())
    if highest > passages.max_tokens:
        raise UserError(
            f"The ratio {highest} exceeds the {passages.max_tokens} tokens of the longest passages.",
            "Choose a smaller ratio, or longer passages: --max-tokens",
        )
    train, held_out = passages_of(backbone, texts, passages, optimisation)
    return train_plugins(
        backbone,
        given.modules,
        train,
        held_out,
        collate_items(backbone),
        losses=losses,
        optimisation=optimisation,
        record={
            "stage": "pre-training",
            "settings": {
                "plugin": plugins.model_dump() if isinstance(plugins, PluginShape) else None,
                "passages": passages.model_dump(),
            },
            "data": describe_texts(texts),
            "parents": given.parents,
        },
        run=run,
        inputs=() if isinstance(plugins, PluginShape) else list(plugins.values()),
    )


def check_targets_of_text(backbone: Backbone, losses: Losses, passages: PassageSettings) -> None:
    """Reject terms of the loss that need targets, where plain text gives none.

    Raises:
        UserError: There is such a term.
    """
    if needs_right_text(backbone, losses):
        if not passages.corruption:
            raise UserError(
                "The decoder's terms of the loss need a target text, which plain text does not have.",
                "Leave out spans for the decoder (--corruption 0.15), or train on a table: `train adapt`, or "
                "`train modules --data`.",
            )
    elif losses.label:
        raise UserError(
            "The loss term label needs labels, which plain text does not have.",
            "Leave the term out, or train on a table: `train adapt`, or `train modules --data`.",
        )


def passages_of(
    backbone: Backbone, texts: Sequence[TextSource], passages: PassageSettings, optimisation: Optimisation
) -> tuple[Any, Any]:
    """The passages to train on, and the held-out passages to measure the loss on.

    Raises:
        UserError: The text is too short, passages are longer than the backbone allows, or the tokenizer has
            no tokens for spans that are left out.
    """
    limit = backbone.max_length
    if limit is not None and passages.max_tokens > limit:
        raise UserError(
            f"Passages of {passages.max_tokens} tokens are longer than the backbone's limit of {limit}.",
            f"--max-tokens {limit}",
        )
    encoder = TextEncoder(backbone.info.source.folder)
    if passages.corruption and not encoder.sentinel_ids():
        raise UserError(
            f"The tokenizer of {backbone.info.source.name} has no tokens for spans that are left out "
            "(<extra_id_0>), as T5's has.",
            "Train on the encoder's states alone: --loss hidden=1, without --corruption",
        )
    train, held_out = tokenize_documents(texts, encoder, passages)
    size, seed = optimisation.batch_size, optimisation.seed
    quiet = passages.model_copy(update={"noise": 0.0})
    batches = math.ceil(passages.held_out_passages / size)
    return (
        Passages(train, encoder, passages, batch_size=size, num_batches=optimisation.steps, seed=seed),
        Passages(held_out, encoder, quiet, batch_size=size, num_batches=batches, seed=seed),
    )


def _new(backbone: Backbone, shape: PluginShape, seed: int) -> GivenPlugins:
    return GivenPlugins(
        {f"ratio-{ratio}": new_plugin(backbone, shape, ratio, seed) for ratio in shape.ratios}, {}
    )


def new_plugin(backbone: Backbone, shape: PluginShape, ratio: int, seed: int) -> CompressionPlugin:
    """Create a plugin in the state in which training starts."""
    size = backbone.info.size
    config = PluginConfig(
        ratio=ratio,
        hidden_size=size.hidden_size,
        bottleneck_size=shape.bottleneck_size,
        num_layers=size.num_layers,
        masking=shape.masking,
        backbone=backbone.info.identity,
    )
    plugin = CompressionPlugin(config).initialise(seed, shape.start)
    if not shape.decompression:
        leave_out_decompression(plugin)
    return plugin
