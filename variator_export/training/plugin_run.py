"""What pre-training and adaptation share: from plugins and batches to published plugin folders."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from variator_export.core.environment import DISTRIBUTION, versions
from variator_export.core.errors import UserError
from variator_export.core.hashing import code_digest
from variator_export.core.progress import Progress
from variator_export.core.store import exclusive, publish, writing_to
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_card import CARD_NAME, PLOT_NAME, is_plugin_folder, plugin_card
from variator_export.model.plugin_file import (
    Plugin,
    PluginConfig,
    load_plugin,
    save_plugin,
)
from variator_export.model.tokenizer import TokenRow, pad_rows
from variator_export.training.checkpoints import History
from variator_export.training.distillation import Distillation
from variator_export.training.loss_plot import save_loss_plot
from variator_export.training.processes import device, is_main_process, num_processes
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.trainer import Batch, fit

# What fine-tuning writes beside the model.
RECORD_NAME = "training.json"
# What can change the result of a run.
RUN_DISTRIBUTIONS = (DISTRIBUTION, "torch", "transformers", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True)
class Origin:
    """Where a run comes from, for those who want to repeat it.

    Attributes:
        command: The command line; None: called from Python.
        terms: Under which terms the data may be used, in the user's words; None: not stated.
    """

    command: str | None = None
    terms: str | None = None


@dataclass(frozen=True)
class TrainedPlugins:
    """What a run made.

    Attributes:
        folders: The plugin folders by name.
        losses: The held-out loss of each at the step that was kept.
        history: All that happened.
    """

    folders: Mapping[str, Path]
    losses: Mapping[str, float]
    history: History


def collate_rows(backbone: Backbone) -> Callable[[Sequence[TokenRow]], Batch]:
    """Makes batches of token rows, padded on the right to the longest."""
    names, pad = backbone.spec.family.inputs, backbone.pad_token_id

    def collate(rows: Sequence[TokenRow]) -> Batch:
        return {name: torch.from_numpy(array) for name, array in pad_rows(rows, names, pad).items()}

    return collate


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
    output: Path,
    half: bool,
    origin: Origin,
    replace: bool,
    restart: bool,
    progress: Progress,
    inputs: Sequence[Path] = (),
) -> TrainedPlugins:
    """Train plugins and publish a folder OUTPUT/NAME for each.

    Args:
        backbone: Frozen.
        plugins: By name; trained in place.
        train: The items, in the order of training.
        held_out: Items to look at the loss on.
        collate: Makes batches of items.
        losses: The terms of the loss.
        optimisation: How parameters move.
        record: What else decides the run; goes into `plugin_config.json` with the rest.
        output: The folder to publish.
        half: Whether to write float16 instead of float32.
        origin: For those who want to repeat it.
        replace: Whether plugins that are there may be replaced.
        restart: Whether to drop an unfinished run instead of going on with it.
        progress: Is told the losses.
        inputs: What the run reads besides the backbone, which it must not replace.
    """
    output = output.absolute()
    progress = progress if is_main_process() else Progress()
    inputs = (*inputs, backbone.info.source.folder)
    with publishing(output, replace=replace, restart=restart, inputs=inputs) as (staging, checkpoints):
        backbone.model.to(device())
        module = Distillation(backbone, plugins, losses)
        settings = {
            **record["settings"],
            "losses": losses.model_dump(),
            "optimisation": optimisation.model_dump(),
        }
        record = {**record, "settings": settings}
        identity = {**record, "backbone": backbone.info.identity.model_dump(), "processes": num_processes()}
        history = fit(module, train, held_out, collate, optimisation, checkpoints, identity, progress)
        best = history.best().metrics
        if is_main_process():
            for name, plugin in plugins.items():
                training = {
                    "stage": record["stage"],
                    "loss": best[name],
                    "steps": history.steps,
                    "best_step": history.best_step,
                    "command": origin.command,
                    "terms": origin.terms,
                    **{key: value for key, value in record.items() if key != "stage"},
                    "processes": num_processes(),
                    "device": device().type,
                    "versions": versions(*RUN_DISTRIBUTIONS),
                    "code": code_digest(),
                }
                training["parent"] = (record.get("parents") or {}).get(name)
                training.pop("parents", None)
                _write(plugin, training, history, name, staging / name, half=half)
    folders = {name: output / name for name in plugins}
    return TrainedPlugins(folders, {name: best[name] for name in plugins}, history)


def _write(
    plugin: CompressionPlugin,
    training: dict[str, Any],
    history: History,
    name: str,
    folder: Path,
    *,
    half: bool,
) -> None:
    config = PluginConfig.model_validate({**plugin.config.model_dump(), "training": training})
    dtype = np.float16 if half else np.float32
    tensors = {key: array.astype(dtype) for key, array in plugin.to_file().tensors.items()}
    save_plugin(Plugin(config, tensors), folder)
    (folder / CARD_NAME).write_text(plugin_card(config), encoding="utf-8")
    save_loss_plot(history, [name], folder / PLOT_NAME)


def check_output(output: Path, *, replace: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that holds something that must not be replaced; before anything slow."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file.", "Choose a folder with --output.")
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"The output {output} holds {path}, which the run reads.",
                "Choose another folder with --output.",
            )
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not _is_replaceable(output):
        raise UserError(
            f"{output} holds files that no training run wrote.",
            "Choose another folder with --output; nothing in this one was touched.",
        )
    if not replace:
        raise UserError(
            f"{output} is there already.", "Choose another folder with --output, or replace it: --replace"
        )


@contextmanager
def publishing(
    output: Path, *, replace: bool, restart: bool, inputs: Sequence[Path] = ()
) -> Iterator[tuple[Path, Path]]:
    """A staging folder that becomes the output at the end, and a folder for checkpoints that a kill leaves.

    Only the main process publishes. Whatever is in the output stays until the new one is whole.

    Args:
        output: The folder.
        replace: Whether what an earlier run wrote there may be replaced.
        restart: Whether to drop an unfinished run.
        inputs: What the run reads, which it must not replace.

    Raises:
        UserError: The output holds something that must not be replaced, or cannot be written.
    """
    checkpoints = output.parent / f".{output.name}.training"
    if not is_main_process():
        yield output, checkpoints
        return
    check_output(output, replace=replace, inputs=inputs)
    state = "What was there is unchanged, and the same command goes on from the last whole checkpoint."
    with exclusive(output) as staging, writing_to(output, state):
        if restart:
            shutil.rmtree(checkpoints, ignore_errors=True)
        yield staging, checkpoints
        publish(staging, output)
        shutil.rmtree(checkpoints, ignore_errors=True)


def _is_replaceable(output: Path) -> bool:
    """Whether a folder holds what a run wrote, and nothing that would be lost besides."""
    if (output / RECORD_NAME).is_file():
        return all(path.is_file() for path in output.iterdir())
    return all(is_plugin_folder(path) for path in output.iterdir())


def load_trained(folder: Path) -> CompressionPlugin:
    """A plugin as modules to be trained further.

    One that was trained without a decompression layer (all of its tensors are 0) stays without.
    """
    module = CompressionPlugin.from_file(load_plugin(folder)).requires_grad_(True)
    if not any(p.any() for layer in module.layer_plugins() for p in layer.decompress.parameters()):
        leave_out_decompression(module)
    return module


def leave_out_decompression(plugin: CompressionPlugin) -> None:
    """Set the decompression layers to 0 and keep them from being trained: an ablation."""
    for layer in plugin.layer_plugins():
        for parameter in layer.decompress.parameters():
            parameter.requires_grad_(False).zero_()
