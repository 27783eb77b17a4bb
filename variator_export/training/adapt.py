"""Stage two of the paper: plugins for a backbone that was tuned for a task."""

from collections.abc import Mapping
from pathlib import Path

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone
from variator_export.model.tokenizer import TextEncoder
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
    """Train plugins further on a task; the folders are OUTPUT/NAME.

    Args:
        backbone: Tuned for the task; the teacher, and what the plugins are put into.
        plugins: The folders of trained plugins by name, all in one run.
        train: Texts of the task. Labels are needed for the loss term `label` only.
        held_out: Texts to look at the loss on.
        run: Where the plugins go.
        losses: The terms of the loss.
        optimisation: How parameters move.
        max_tokens: Longer texts are cut.

    Raises:
        UserError: A plugin does not fit the backbone, a label is missing or unknown; see `train_plugins`.
    """
    given = load_given(plugins, backbone)
    with_labels = bool(losses.label)
    if with_labels and (train.targets is None or held_out.targets is None):
        raise UserError(
            "The loss term label needs labels; the data was read without them.", "Give --label-column NAME."
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
