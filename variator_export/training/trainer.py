"""The training loop: transformers' Trainer, with what this project needs of it fixed in one place.

What is trained is a `TrainedModule`.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from variator_export.core.errors import UserError
from variator_export.core.progress import Progress
from variator_export.model.backbone import quiet_transformers
from variator_export.training.checkpoints import (
    History,
    claim,
    history_of,
    is_finished,
    is_out_of_patience,
    last_checkpoint,
    load_best,
    loss_point,
    read_state,
    step_of,
)
from variator_export.training.processes import is_main_process, num_processes
from variator_export.training.settings import Optimisation
from variator_export.training.trained_module import TrainedModule

_LOG_EVERY = 10

Batch = dict[str, Tensor]


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

    A run that was killed goes on where its last checkpoint was and ends with the same parameters. Only the
    main process is to be given a progress that says anything.

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
    batch_size = _per_process(settings.batch_size)
    arguments = _arguments(settings, folder, batch_size)
    # The others look for checkpoints after the main process has dropped what is not to be continued.
    with arguments.main_process_first(local=False, desc="claim the run"):
        if is_main_process():
            claim(folder, identity)
        last = last_checkpoint(folder)
    state = read_state(last) if last is not None else None
    if state is not None and is_finished(state, settings):
        load_best(module, folder, state)
        return history_of(module, state)
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
        compute_metrics=_Averages(module),
        callbacks=[_Watch(module, settings, progress)],
    )
    # Progress and metrics are ours to print.
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    if last is not None:
        progress.note(f"continuing from step {step_of(last)} ({last})")
    with quiet_transformers(), progress.bar("training", settings.steps) as advance:
        trainer.add_callback(_Bar(advance))
        try:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        except (RuntimeError, SafetensorError) as error:
            _refuse_out_of_memory(settings, error)
            _refuse_full_disk(folder, 16 * sum(p.numel() for p in parameters), error)
            raise
    return history_of(module, vars(trainer.state))


class _Trainer(transformers.Trainer):
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The metrics of each row. No loss: the Trainer would average batches, whatever their size."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            metrics = model(**inputs)["metrics"].float()
        return None, metrics, torch.zeros(metrics.shape[0], device=metrics.device)


class _Averages:
    """Means of the metrics over the held-out data, by number: a name might mean something to the Trainer."""

    def __init__(self, module: TrainedModule) -> None:
        self._num_loss_metrics = module.num_loss_metrics

    def __call__(self, found: Any) -> dict[str, float]:
        means = found.predictions.astype("float64").mean(axis=0)
        loss = float(means[: self._num_loss_metrics].sum())
        return {"loss": loss, **{f"metric_{index}": float(mean) for index, mean in enumerate(means)}}


class _Watch(transformers.TrainerCallback):
    """Clips gradients, refuses a loss that is no number, tells the held-out losses, stops early."""

    def __init__(self, module: TrainedModule, settings: Optimisation, progress: Progress) -> None:
        self._module = module
        self._settings = settings
        self._progress = progress

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Clip each part apart: plugins that are trained together do not depend on each other."""
        del args, control, context
        for part in self._module.clipped:
            norm = nn.utils.clip_grad_norm_(part.parameters(), self._settings.max_grad_norm)
            if not torch.isfinite(norm):
                raise UserError(
                    f"The gradients of step {state.global_step + 1} are not finite: the run diverged.",
                    f"Start again with a lower learning rate than {self._settings.learning_rate:g} "
                    "(--learning-rate, --restart).",
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Tell the metrics, and stop where patience is at its end."""
        del args
        point = loss_point(self._module, {**context["metrics"], "step": state.global_step})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in point.metrics.items())
        self._progress.note(f"step {state.global_step}: on held-out data {shown}")
        if is_out_of_patience(state.log_history, self._settings):
            control.should_training_stop = True


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


def _refuse_out_of_memory(settings: Optimisation, error: Exception) -> None:
    """Say in words that memory is short; on a CPU torch has no error of its own for it."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise UserError(
            f"The memory does not suffice for batches of {settings.batch_size} texts.",
            "Take a smaller --batch-size or shorter texts (--max-tokens), with --restart, or more processes.",
        ) from error


def _refuse_full_disk(folder: Path, num_bytes: int, error: Exception) -> None:
    """Raise the operating system's own error if a checkpoint cannot be written.

    torch and safetensors say that a disk is full in errors that could be anything.
    """
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as refusal:
        raise refusal from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
