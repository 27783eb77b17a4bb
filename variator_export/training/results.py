"""What every training of plugins or modules does: fit, and publish a folder for each result."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.model.backbone import Backbone
from variator_export.model.card import CARD_NAME, PLOT_NAME
from variator_export.training.checkpoints import History
from variator_export.training.loss_plot import save_loss_plot
from variator_export.training.processes import device, is_main_process, num_processes
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation
from variator_export.training.trained_module import TrainedModule
from variator_export.training.trainer import Batch, fit


@dataclass(frozen=True)
class TrainedFolders:
    """Result of a run.

    Attributes:
        folders: The published folders by name.
        losses: The held-out loss of each, at the step that was kept.
        history: History of the run.
    """

    folders: Mapping[str, Path]
    losses: Mapping[str, float]
    history: History


def train_and_publish(
    backbone: Backbone,
    names: Sequence[str],
    make: Callable[[], TrainedModule],
    write: Callable[[str, dict[str, Any], Path], str],
    data: tuple[Any, Any],
    collate: Callable[[Sequence[Any]], Batch],
    *,
    settings: Mapping[str, Any],
    optimisation: Optimisation,
    record: Mapping[str, Any],
    run: Run,
    inputs: Sequence[Path] = (),
) -> TrainedFolders:
    """Train, and publish a folder OUTPUT/NAME for each result.

    Args:
        backbone: The backbone, which stays frozen.
        names: Names of the results, which are the metrics of the trained module.
        make: Makes the trained module, once the backbone is on the device to train on.
        write: Writes the files of a result, of (its name, the record of its training, its folder); returns
            its card.
        data: Items to train on, in the order of training, and held-out items.
        collate: Collates items into a batch.
        settings: Settings besides those of the record and the optimizer.
        optimisation: Settings of the optimizer.
        record: Everything else that determines the run. It is stored with each result.
        run: The training run, which says where the folders are published.
        inputs: Paths that the run reads besides the backbone. The run must not replace them.
    """
    with run.publishing((*inputs, backbone.info.source.folder)) as (staging, checkpoints):
        backbone.model.to(device())
        module = make()
        settings = {**record["settings"], **settings, "optimisation": optimisation.model_dump()}
        record = {**record, "settings": settings}
        identity = {
            **record,
            "backbone": dataclasses.asdict(backbone.info.identity),
            "processes": num_processes(),
        }
        history = fit(module, *data, collate, optimisation, checkpoints, identity, run.listener())
        best = history.best().metrics
        for name in names if is_main_process() else ():
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
            card = write(name, training, staging / name)
            (staging / name / CARD_NAME).write_text(card, encoding="utf-8")
            save_loss_plot(history, [name], staging / name / PLOT_NAME)
    return TrainedFolders(
        {name: run.output / name for name in names}, {name: best[name] for name in names}, history
    )
