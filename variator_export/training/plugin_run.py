"""Shared part of pre-training and adaptation: training plugins on batches and publishing their folders."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_card import plugin_card
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.training.distillation import Distillation
from variator_export.training.results import TrainedFolders, train_and_publish
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.trainer import Batch


def train_plugins(
    backbone: Backbone,
    plugins: Mapping[str, CompressionPlugin],
    train: Dataset[Any],
    held_out: Dataset[Any],
    collate: Callable[[Sequence[Any]], Batch],
    *,
    losses: Losses,
    optimisation: Optimisation,
    record: Mapping[str, Any],
    run: Run,
    inputs: Sequence[Path] = (),
) -> TrainedFolders:
    """Train plugins and publish a folder OUTPUT/NAME for each.

    Args:
        backbone: The backbone, which stays frozen.
        plugins: The plugins by name, trained in place.
        train: Items to train on, in the order of training.
        held_out: Items on which the loss is evaluated.
        collate: Collates items into a batch.
        losses: Weights of the terms of the loss.
        optimisation: Settings of the optimizer.
        record: Everything else that determines the run. It is stored in `plugin_config.json` with the rest.
        run: The training run, which says where the folders are published.
        inputs: Paths that the run reads besides the backbone. The run must not replace them.
    """

    def write(name: str, training: dict[str, Any], folder: Path) -> str:
        config = dataclasses.replace(plugins[name].config, training=training)
        arrays = plugins[name].to_file().tensors
        tensors = {key: array.astype(run.dtype) for key, array in arrays.items()}
        save_plugin(Plugin(config, tensors), folder)
        return plugin_card(config)

    return train_and_publish(
        backbone,
        tuple(plugins),
        lambda: Distillation(backbone, plugins, losses),
        write,
        (train, held_out),
        collate,
        settings={"losses": losses.model_dump()},
        optimisation=optimisation,
        record=record,
        run=run,
        inputs=inputs,
    )
