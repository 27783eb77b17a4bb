"""The checkpoint folder of an unfinished run: which run it belongs to, its last step, and its history."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_json
from variator_export.core.json_file import read_json_object, write_json
from variator_export.training.settings import Optimisation
from variator_export.training.trained_module import TrainedModule

_RUN_NAME = "run.json"
_STATE_NAME = "trainer_state.json"
_DIVERGED = "Start again with a lower learning rate (--learning-rate, --restart)."


@dataclass(frozen=True)
class LossPoint:
    """One evaluation on the held-out data.

    Attributes:
        step: Number of steps before the evaluation.
        loss: The summed loss, by which the step to keep is chosen.
        metrics: Metrics by name.
    """

    step: int
    loss: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class History:
    """History of a run.

    Attributes:
        steps: Number of steps trained; fewer than requested if the run stopped early.
        best_step: The step whose parameters were kept.
        held_out: Evaluations on the held-out data, in order.
    """

    steps: int
    best_step: int
    held_out: tuple[LossPoint, ...]

    def best(self) -> LossPoint:
        """Return the evaluation of the parameters that were kept."""
        return next(point for point in self.held_out if point.step == self.best_step)


def claim(folder: Path, identity: Any) -> None:
    """Claim the folder for this run.

    Raises:
        UserError: The folder holds checkpoints of a run that another command started.
    """
    settings = json.loads(json.dumps(identity))
    wanted = {"identity": sha256_json(settings), "settings": settings}
    path = folder / _RUN_NAME
    # A run that did not reach its first checkpoint has nothing to lose.
    if path.exists() and last_checkpoint(folder) is not None:
        found = read_json_object(path, f"Drop the run with --restart, or remove {folder}.")
        if found.get("identity") != wanted["identity"]:
            raise UserError(
                f"{folder} holds an unfinished run of another command: {_difference(found, wanted)}.",
                "Repeat that command to finish it, choose another --output, or drop it with --restart.",
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, wanted)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint, or None. Its state file is written last and marks it complete."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            read_state(path)
            return path
    return None


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the Trainer's state from a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    return state


def is_out_of_patience(log: Sequence[Mapping[str, Any]], settings: Optimisation) -> bool:
    """Check whether the last `patience` evaluations in a row found no better loss, so that the run stops."""
    if settings.patience is None:
        return False
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= settings.patience


def is_finished(state: Mapping[str, Any], settings: Optimisation) -> bool:
    """Check whether a run had already trained its last step when it was killed before publishing."""
    return state["global_step"] >= settings.steps or is_out_of_patience(state["log_history"], settings)


def load_best(module: TrainedModule, folder: Path, state: Mapping[str, Any]) -> None:
    """Load the parameters with the best loss on the held-out data into a module."""
    weights = folder / f"checkpoint-{state['best_global_step']}" / "model.safetensors"
    module.load_state_dict(load_file(weights))


def history_of(module: TrainedModule, state: Mapping[str, Any]) -> History:
    """Return the history of a run, from the Trainer's state.

    Raises:
        UserError: A loss is not a finite number.
    """
    held_out = tuple(loss_point(module, entry) for entry in state["log_history"] if "eval_loss" in entry)
    if not held_out or not all(math.isfinite(point.loss) for point in held_out):
        raise UserError("The loss on the held-out data is not a finite number: the run diverged.", _DIVERGED)
    return History(int(state["global_step"]), int(state["best_global_step"]), held_out)


def loss_point(module: TrainedModule, entry: Mapping[str, Any]) -> LossPoint:
    """Return one evaluation on the held-out data, from an entry of the Trainer's log."""
    metrics = {name: float(entry[f"eval_metric_{index}"]) for index, name in enumerate(module.metric_names)}
    return LossPoint(int(entry["step"]), float(entry["eval_loss"]), metrics)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old, new = _flat(found.get("settings")), _flat(wanted["settings"])
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:3])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
