"""Training modules further: for a task, on a backbone that was fine-tuned for it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone
from variator_export.model.modular.assembled import loaded_layer, trainable
from variator_export.model.modular.files import resolve_modules
from variator_export.model.modular.weights import load_modules
from variator_export.training.adapt import adaptation_data
from variator_export.training.batches import collate_items
from variator_export.training.given_plugins import check_name
from variator_export.training.modular.pretrain import new_modules
from variator_export.training.modular.replacing import check_module_losses
from variator_export.training.modular.run import NewModules, train_modules
from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation
from variator_export.training.task_data import describe_examples


def adapt_modules(
    backbone: Backbone,
    modules: ModuleShape | Mapping[str, Path],
    train: Examples,
    held_out: Examples,
    run: Run,
    *,
    losses: ModuleLosses,
    replacing: Replacing,
    optimisation: Optimisation,
    max_tokens: int = 128,
    max_target_tokens: int = 128,
) -> TrainedFolders:
    """Train modules on a task. The results are published as OUTPUT/NAME.

    Args:
        backbone: The backbone, fine-tuned for the task. It is the teacher; the modules replace its layers.
        modules: Folders of modules to train further, by name; or the shape of new ones. All are trained in
            one run.
        train: Texts of the task. Labels are needed only for the loss term `label`; the target texts, only for
            the terms `decoder`, `logits` and `label` of a backbone that generates text.
        held_out: Texts on which the loss is evaluated.
        run: The training run, which says where the modules are published.
        losses: Weights of the terms of the loss.
        replacing: The schedule of the replacing.
        optimisation: Settings of the optimizer.
        max_tokens: Longer texts are truncated to this number of tokens.
        max_target_tokens: Longer target texts are truncated to this number of tokens.

    Raises:
        UserError: Modules do not fit the backbone, or a label is missing or unknown.
    """
    run.check_output()
    parents: dict[str, Any] = {}
    if isinstance(modules, ModuleShape):
        sets = new_modules(backbone, modules)
    else:
        for name in modules:
            check_name(name)
        given = {name: _load(folder, backbone) for name, folder in modules.items()}
        sets = {name: made for name, (made, _) in given.items()}
        parents = {name: parent for name, (_, parent) in given.items()}
    check_module_losses(backbone, losses, [made.config.stack for made in sets.values()])
    data, settings = adaptation_data(
        backbone, train, held_out, losses, optimisation, max_tokens, max_target_tokens
    )
    if isinstance(modules, ModuleShape):
        settings |= {"modules": modules.model_dump()}
    return train_modules(
        backbone,
        sets,
        data,
        collate_items(backbone),
        losses=losses,
        replacing=replacing,
        optimisation=optimisation,
        record={
            "stage": "adaptation",
            "settings": settings,
            "data": describe_examples(("training", train), ("held out", held_out)),
            "parents": parents,
        },
        run=run,
        inputs=[] if isinstance(modules, ModuleShape) else list(modules.values()),
    )


def _load(folder: Path, backbone: Backbone) -> tuple[NewModules, dict[str, Any]]:
    """Modules to train further, and their origin for `module_config.json`.

    The backbone may be a fine-tuned version of the one that they were trained for.
    """
    resolved, modules = resolve_modules(folder), load_modules(folder)
    config = modules.config
    expected = backbone.info.stack_layers.get(config.stack), backbone.info.size.hidden_size
    if (config.num_layers, config.hidden_size) != expected:
        raise UserError(
            f"The modules {folder} are for {config.num_layers} {config.stack} layers of hidden size "
            f"{config.hidden_size}; {backbone.info.source.name} has {expected[0]} of {expected[1]}.",
            "Give modules that were trained for the model that this backbone was fine-tuned from.",
        )
    loaded = tuple(
        trainable(backbone.spec.family, loaded_layer(backbone, modules, index))
        for index in range(len(config.modules))
    )
    # From here on, the modules belong to this backbone.
    config = dataclasses.replace(config, backbone=backbone.info.identity)
    parent = {"name": folder.name, "sha256": resolved.sha256, "training": modules.config.training}
    return NewModules(config, loaded), parent
