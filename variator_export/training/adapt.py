"""Adaptation, stage two of the paper: training plugins for a backbone that was fine-tuned for a task."""

from collections.abc import Mapping
from pathlib import Path

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.given_plugins import load_given
from variator_export.training.plugin_run import TrainedPlugins, train_plugins
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.task_data import (
    collate_items,
    describe_examples,
    task_data,
)


def adapt(
    backbone: Backbone,
    plugins: Mapping[str, Path],
    train: Examples,
    held_out: Examples,
    run: Run,
    *,
    losses: Losses,
    optimisation: Optimisation,
    max_tokens: int = 128,
) -> TrainedPlugins:
    """Train existing plugins further on a task. The results are published as OUTPUT/NAME.

    Args:
        backbone: The backbone, fine-tuned for the task. It is the teacher, and the plugins are inserted
            into it.
        plugins: Folders of the trained plugins, by name. All are trained in one run.
        train: Texts of the task. Labels are needed only for the loss term `label`.
        held_out: Texts on which the loss is evaluated.
        run: The training run, which says where the plugins are published.
        losses: Weights of the terms of the loss.
        optimisation: Settings of the optimizer.
        max_tokens: Longer texts are truncated to this number of tokens.

    Raises:
        UserError: A plugin does not fit the backbone, or a label is missing or unknown; see also
            `train_plugins`.
    """
    given = load_given(plugins, backbone)
    with_labels = bool(losses.label)
    if with_labels and (train.targets is None or held_out.targets is None):
        raise UserError(
            "The loss term label needs labels; the data was read without any.", "Give --label-column NAME."
        )
    limit = min(max_tokens, backbone.max_length or max_tokens)
    return train_plugins(
        backbone,
        given.modules,
        *task_data(
            train,
            held_out,
            TextEncoder(backbone.info.source.folder),
            max_tokens=limit,
            label2id=getattr(backbone.info.config, "label2id", {}) if with_labels else None,
            optimisation=optimisation,
        ),
        collate_items(backbone, with_labels=with_labels),
        losses=losses,
        optimisation=optimisation,
        record={
            "stage": "adaptation",
            "settings": {"max_tokens": limit},
            "data": describe_examples(("training", train), ("held out", held_out)),
            "parents": given.parents,
        },
        run=run,
        inputs=list(plugins.values()),
    )
