"""Shared part of pre-training and adaptation: training modules on batches and publishing their folders."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from variator_export.model.backbone import Backbone
from variator_export.model.modular.assembled import refuse_assembly, state_of_modules
from variator_export.model.modular.card import module_card
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.modular.weights import ModuleSet, save_modules
from variator_export.training.modular.replacing import ModuleReplacing
from variator_export.training.modular.settings import ModuleLosses, Replacing
from variator_export.training.results import TrainedFolders, train_and_publish
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation
from variator_export.training.trainer import Batch


@dataclass(frozen=True)
class NewModules:
    """A set of modules that is trained."""

    config: ModuleConfig
    layers: tuple[nn.Module, ...]


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
) -> TrainedFolders:
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

    def make() -> ModuleReplacing:
        given = {name: (modules.config, modules.layers) for name, modules in sets.items()}
        steps, seed = optimisation.steps, optimisation.seed
        return ModuleReplacing(backbone, given, losses, replacing, steps=steps, seed=seed)

    def write(name: str, training: dict[str, Any], folder: Path) -> str:
        config = dataclasses.replace(sets[name].config, training=training)
        state = state_of_modules(backbone.spec.family, sets[name].layers)
        tensors = {key: tensor.to(getattr(torch, run.dtype)) for key, tensor in state.items()}
        save_modules(ModuleSet(name, config, tensors), folder)
        return module_card(config)

    return train_and_publish(
        backbone,
        tuple(sets),
        make,
        write,
        data,
        collate,
        settings={"losses": losses.model_dump(), "replacing": replacing.model_dump()},
        optimisation=optimisation,
        record=record,
        run=run,
        inputs=inputs,
    )
