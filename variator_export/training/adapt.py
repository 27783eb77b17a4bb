"""Stage two of the paper: plugins for a backbone that was tuned for a task."""

import re
from collections.abc import Mapping
from pathlib import Path

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import PluginConfig, load_plugin_config, plugin_sha256
from variator_export.model.tokenizer import TextEncoder
from variator_export.training.plugin_run import (
    TrainedPlugins,
    load_trained,
    train_plugins,
)
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.task_data import (
    collate_items,
    describe_examples,
    task_data,
)

# As variants are named (core.recipe).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
    for name in plugins:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a plugin: its folder has this name.",
                "Use letters, digits, '-', '_' and '.', and begin with a letter or a digit.",
            )
    modules = {name: _load(folder, backbone) for name, folder in plugins.items()}
    parents = {
        name: {
            "name": name,
            "sha256": plugin_sha256(folder),
            "training": load_plugin_config(folder).training,
        }
        for name, folder in plugins.items()
    }
    with_labels = bool(losses.label)
    if with_labels and (train.targets is None or held_out.targets is None):
        raise UserError(
            "The loss term label needs labels; the data was read without them.", "Give --label-column NAME."
        )
    limit = min(max_tokens, backbone.max_length or max_tokens)
    return train_plugins(
        backbone,
        modules,
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
            "parents": parents,
        },
        run=run,
        inputs=list(plugins.values()),
    )


def _load(folder: Path, backbone: Backbone) -> CompressionPlugin:
    module = load_trained(folder)
    size, config = backbone.info.size, module.config
    if (config.num_layers, config.hidden_size) != (size.num_layers, size.hidden_size):
        raise UserError(
            f"The plugin {folder} is for {config.num_layers} layers of hidden size {config.hidden_size}; "
            f"{backbone.info.source.name} has {size.num_layers} of {size.hidden_size}.",
            "Give plugins that were pre-trained for the model that this backbone was tuned from.",
        )
    # From here on it is for this backbone.
    module.config = PluginConfig.model_validate(
        {**config.model_dump(), "backbone": backbone.info.identity.model_dump()}
    )
    return module
