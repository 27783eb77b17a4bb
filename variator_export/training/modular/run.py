"""Shared part of pre-training and adaptation: training modules on batches and publishing their folders."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from variator_export.model.backbone import Backbone
from variator_export.model.card import CARD_NAME, PLOT_NAME
from variator_export.model.modular.assembled import refuse_assembly, state_of_modules
from variator_export.model.modular.card import module_card
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.modular.weights import ModuleSet, save_modules
from variator_export.training.checkpoints import History
from variator_export.training.loss_plot import save_loss_plot
from variator_export.training.modular.replacing import ModuleReplacing
from variator_export.training.modular.settings import ModuleLosses, Replacing
from variator_export.training.processes import device, is_main_process, num_processes
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation
from variator_export.training.trainer import Batch, fit


@dataclass(frozen=True)
class NewModules:
    """A set of modules that is trained."""

    config: ModuleConfig
    layers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class TrainedModules:
    """Result of a run.

    Attributes:
        folders: The folders of modules by name.
        losses: The held-out loss of the assembly with all modules of each set, at the step that was kept.
        history: History of the run.
    """

    folders: Mapping[str, Path]
    losses: Mapping[str, float]
    history: History


def train_modules(
    backbone: Backbone,
    sets: Mapping[str, NewModules],
    data: tuple[Any, Any],
    collate: Callable[[Sequence[Any]], Batch],
    *,
    losses: ModuleLosses,
    replacing: Replacing,
    optimisation: Optimisation,
    record: Mapping[str, Any],
    run: Run,
    inputs: Sequence[Path] = (),
) -> TrainedModules:
    """Train modules and publish a folder OUTPUT/NAME for each set.

    Args:
        backbone: The backbone, which stays frozen.
        sets: The modules by name, trained in place.
        data: Items to train on, in the order of training, and held-out items.
        collate: Collates items into a batch.
        losses: Weights of the terms of the loss.
        replacing: The schedule of the replacing.
        optimisation: Settings of the optimizer.
        record: Everything else that determines the run. It is stored in `module_config.json` with the rest.
        run: The training run, which says where the folders are published.
        inputs: Paths that the run reads besides the backbone. The run must not replace them.
    """
    refuse_assembly(backbone.info)
    with run.publishing((*inputs, backbone.info.source.folder)) as (staging, checkpoints):
        backbone.model.to(device())
        module = ModuleReplacing(
            backbone,
            {name: (modules.config, modules.layers) for name, modules in sets.items()},
            losses,
            replacing,
            steps=optimisation.steps,
            seed=optimisation.seed,
        )
        settings = {
            **record["settings"],
            "losses": losses.model_dump(),
            "replacing": replacing.model_dump(),
            "optimisation": optimisation.model_dump(),
        }
        record = {**record, "settings": settings}
        identity = {
            **record,
            "backbone": dataclasses.asdict(backbone.info.identity),
            "processes": num_processes(),
        }
        history = fit(module, *data, collate, optimisation, checkpoints, identity, run.listener())
        best = history.best().metrics
        if is_main_process():
            for name, modules in sets.items():
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
                config = dataclasses.replace(modules.config, training=training)
                state = state_of_modules(backbone.spec.family, modules.layers)
                tensors = {key: tensor.to(getattr(torch, run.dtype)) for key, tensor in state.items()}
                save_modules(ModuleSet(name, config, tensors), staging / name)
                (staging / name / CARD_NAME).write_text(module_card(config), encoding="utf-8")
                save_loss_plot(history, [name], staging / name / PLOT_NAME)
    return TrainedModules(
        {name: run.output / name for name in sets}, {name: best[name] for name in sets}, history
    )
