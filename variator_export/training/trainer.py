"""The training loop: transformers' Trainer, with what this project needs of it fixed in one place.

Whatever is trained is a module whose forward gives `loss`, a mean over the rows of a batch, and `metrics`,
one such mean for each of its `metric_names`. Then a batch spread over processes gives what it gives in one.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_json
from variator_export.core.json_file import read_json_object, write_json
from variator_export.core.progress import Progress
from variator_export.training.settings import Optimisation

RUN_NAME = "run.json"
_STATE_NAME = "trainer_state.json"
_LOG_EVERY = 10

Batch = dict[str, Tensor]


class TrainedModule(nn.Module):
    """What `fit` trains: see the head of this file."""

    # The Trainer is not to scale the loss by the number of labels: it is a mean already.
    accepts_loss_kwargs = False
    metric_names: tuple[str, ...]
    # The groups whose gradients are clipped apart.
    clipped: tuple[nn.Module, ...]


@dataclass(frozen=True)
class LossPoint:
    """One look at the held-out data.

    Attributes:
        step: After how many steps.
        metrics: By name, with `loss`.
    """

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class History:
    """What happened in a run.

    Attributes:
        steps: Steps made; fewer than asked for if it stopped early.
        best_step: The step whose parameters were kept.
        train: (step, loss) at regular intervals, a mean since the last.
        held_out: Looks at the held-out data, in order.
    """

    steps: int
    best_step: int
    train: tuple[tuple[int, float], ...]
    held_out: tuple[LossPoint, ...]

    def best(self) -> LossPoint:
        """The look at the parameters that were kept."""
        return next(point for point in self.held_out if point.step == self.best_step)


def device() -> torch.device:
    """Where this process trains."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def num_processes() -> int:
    """How many processes train together (`accelerate launch`)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes files and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def fit(
    module: TrainedModule,
    train: Dataset[Any],
    held_out: Dataset[Any],
    collate: Callable[[Sequence[Any]], Batch],
    settings: Optimisation,
    folder: Path,
    identity: Any,
    progress: Progress,
) -> History:
    """Train a module in place, and leave it with the parameters of the best look at the held-out data.

    A run that was killed goes on where its last checkpoint was and ends with the same parameters.

    Args:
        module: What to train.
        train: At least steps * batch_size items, in the order of training.
        held_out: What the loss is looked at on.
        collate: Makes a batch of items.
        settings: How.
        folder: Where checkpoints lie; made if it is not there.
        identity: A JSON value of everything that decides the run.
        progress: Is told the losses.

    Raises:
        UserError: The folder holds a run with another identity, the batch does not divide by the number of
            processes, or the loss is no number.
    """
    arguments = _arguments(settings, folder, _per_process(settings.batch_size))
    # The others look for checkpoints after the main process has dropped what is not to be continued.
    with arguments.main_process_first(local=False, desc="claim the run"):
        _claim(folder, identity)
        last = _last_checkpoint(folder)
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Adam with weight decay in the gradient, as the paper's code has it; not AdamW.
    optimizer = torch.optim.Adam(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings))
    trainer = _Trainer(
        model=module,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=cast(Any, collate),
        optimizers=(optimizer, scheduler),
        compute_metrics=_Averages(module.metric_names),
        callbacks=[_Watch(settings, progress)],
    )
    # Progress and metrics are ours to print.
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    if settings.patience is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(settings.patience))
    if last is not None:
        progress.note(f"continuing from step {int(last.name.rpartition('-')[2])} ({last})")
    with _quiet(), progress.bar("training", settings.steps) as advance:
        trainer.add_callback(_Bar(advance))
        try:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        except (RuntimeError, SafetensorError) as error:
            _refuse_full_disk(folder, 16 * sum(p.numel() for p in parameters), error)
            raise
    return _history(trainer.state)


class _Trainer(transformers.Trainer):
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The metrics of a batch, once for each of its rows, so that batches of any size average right."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        rows = next(iter(inputs.values())).shape[0]
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        metrics = outputs["metrics"].float().unsqueeze(0).expand(rows, -1).contiguous()
        return outputs["loss"].detach().float(), metrics, torch.zeros(rows, device=metrics.device)


class _Averages:
    """Means of the metrics over the held-out data."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, found: Any) -> dict[str, float]:
        means = found.predictions.astype("float64").mean(axis=0)
        return dict(zip(self.names, map(float, means), strict=True))


class _Watch(transformers.TrainerCallback):
    """Clips gradients, refuses a loss that is no number, tells the held-out losses."""

    def __init__(self, settings: Optimisation, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Clip each part apart: plugins that are trained together do not depend on each other."""
        del args, control
        module = context["model"]
        module = getattr(module, "module", module)
        for part in module.clipped:
            norm = nn.utils.clip_grad_norm_(part.parameters(), self._settings.max_grad_norm)
            if not torch.isfinite(norm):
                raise UserError(
                    f"The gradients of step {state.global_step + 1} are not finite: the run diverged.",
                    f"Start again with a lower learning rate than {self._settings.learning_rate:g} "
                    "(--learning-rate, --restart).",
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Tell the metrics."""
        del args, control
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in context["metrics"].items()
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
        }
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "loss")
        if state.is_world_process_zero:
            self._progress.note(f"step {state.global_step}: on held-out data {shown}")


class _Bar(transformers.TrainerCallback):
    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Show what an earlier run did already."""
        del args, control, context
        for _ in range(state.global_step):
            self._advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """One more."""
        del args, state, control, context
        self._advance()


def _per_process(batch_size: int) -> int:
    processes = num_processes()
    if batch_size % processes:
        raise UserError(
            f"A batch of {batch_size} texts cannot be shared evenly by {processes} processes.",
            f"--batch-size {max(1, batch_size // processes) * processes}",
        )
    return batch_size // processes


def _arguments(settings: Optimisation, folder: Path, batch_size: int) -> transformers.TrainingArguments:
    every = min(settings.eval_every, settings.steps)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        train_sampling_strategy="sequential",
        seed=settings.seed,
        bf16=settings.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=0.0,  # `_Watch` clips
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=_LOG_EVERY,
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def _schedule(settings: Optimisation) -> Callable[[int], float]:
    """The learning rate of a step as a share of the highest."""

    def share(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        if settings.schedule == "constant":
            return 1.0
        return max(0.0, (settings.steps - step) / max(1, settings.steps - settings.warmup_steps))

    return share


def _claim(folder: Path, identity: Any) -> None:
    """Refuse to go on with a run that another command began."""
    if not is_main_process():
        return
    wanted = {"identity": sha256_json(identity), "settings": identity}
    path = folder / RUN_NAME
    if path.exists():
        found = read_json_object(path, f"Remove {folder} to start afresh.")
        if found.get("identity") != wanted["identity"]:
            raise UserError(
                f"{folder} holds an unfinished run of another command: {_difference(found, wanted)}.",
                "Repeat that command to finish it, choose another --output, or drop it with --restart.",
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, wanted)


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


def _last_checkpoint(folder: Path) -> Path | None:
    """The last one that was written whole: its state is written last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
            return path
    return None


def _refuse_full_disk(folder: Path, num_bytes: int, error: Exception) -> None:
    """Raise the operating system's own error if a checkpoint cannot be written.

    torch and safetensors say that a disk is full in errors that could be anything.
    """
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(num_bytes))
    except OSError as refusal:
        raise refusal from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _history(state: Any) -> History:
    train = tuple((int(e["step"]), float(e["loss"])) for e in state.log_history if "loss" in e)
    held_out = tuple(
        LossPoint(
            int(entry["step"]),
            {
                name.removeprefix("eval_"): float(value)
                for name, value in entry.items()
                if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
            },
        )
        for entry in state.log_history
        if "eval_loss" in entry
    )
    if not held_out or not all(math.isfinite(v) for point in held_out for v in point.metrics.values()):
        raise UserError(
            "The loss on the held-out data is no number: the run diverged.",
            "Start again with a lower learning rate (--learning-rate, --restart).",
        )
    return History(int(state.global_step), int(state.best_global_step), train, held_out)


@contextlib.contextmanager
def _quiet() -> Any:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
