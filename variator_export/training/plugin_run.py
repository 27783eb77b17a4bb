"""Shared part of pre-training and adaptation: training plugins on batches and publishing their folders."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from variator_export.model.backbone import Backbone
from variator_export.model.card import CARD_NAME, PLOT_NAME
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_card import plugin_card
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.training.checkpoints import History
from variator_export.training.distillation import Distillation
from variator_export.training.loss_plot import save_loss_plot
from variator_export.training.processes import device, is_main_process, num_processes
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.trainer import Batch, fit


@dataclass(frozen=True)
class TrainedPlugins:
    """Result of a run.

    Attributes:
        folders: The plugin folders by name.
        losses: The held-out loss of each plugin, at the step that was kept.
        history: History of the run.
    """

    folders: Mapping[str, Path]
    losses: Mapping[str, float]
    history: History


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
) -> TrainedPlugins:
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
    with run.publishing((*inputs, backbone.info.source.folder)) as (staging, checkpoints):
        backbone.model.to(device())
        module = Distillation(backbone, plugins, losses)
        settings = {
            **record["settings"],
            "losses": losses.model_dump(),
            "optimisation": optimisation.model_dump(),
        }
        record = {**record, "settings": settings}
        identity = {
            **record,
            "backbone": dataclasses.asdict(backbone.info.identity),
            "processes": num_processes(),
        }
        history = fit(module, train, held_out, collate, optimisation, checkpoints, identity, run.listener())
        best = history.best().metrics
        if is_main_process():
            for name, plugin in plugins.items():
                training = {
                    "stage": record["stage"],
                    "loss": best[name],
                    "steps": history.steps,
                    "best_step": history.best_step,
                    "settings": settings,
                    "data": record["data"],
                    "parent": (record.get("parents") or {}).get(name),
                    **run.record(),
                }
                config = dataclasses.replace(plugin.config, training=training)
                tensors = {key: array.astype(run.dtype) for key, array in plugin.to_file().tensors.items()}
                folder = staging / name
                save_plugin(Plugin(config, tensors), folder)
                (folder / CARD_NAME).write_text(plugin_card(config), encoding="utf-8")
                save_loss_plot(history, [name], folder / PLOT_NAME)
    folders = {name: run.output / name for name in plugins}
    return TrainedPlugins(folders, {name: best[name] for name in plugins}, history)
