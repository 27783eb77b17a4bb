"""The training loop: transformers' Trainer, configured for this project in one place.

It trains a `TrainedModule`.
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
    """Train a module in place. It ends with the parameters that had the best loss on the held-out data.

    A run that was killed continues from its last checkpoint and ends with the same parameters. Only the main
    process should be given a progress that prints anything.

    Args:
        module: The module to train.
        train: At least steps * batch_size items, in the order of training.
        held_out: Items on which the loss is evaluated.
        collate: Collates items into a batch.
        settings: Settings of the optimizer and the training loop.
        folder: Folder of the checkpoints, created if it does not exist.
        identity: Everything that determines the run, as a JSON value.
        progress: Receives the losses.

    Returns:
        The history of the run.

    Raises:
        UserError: The folder holds a run with another identity, the batch size is not divisible by the number
            of processes, or the loss is not a finite number.
    """
    batch_size = _per_process(settings.batch_size)
    arguments = _arguments(module, settings, folder, batch_size)
    # The main process first drops checkpoints that are not to be continued. Only then do the other processes
    # look for checkpoints.
    with arguments.main_process_first(local=False, desc="claim the run"):
        if is_main_process():
            claim(folder, identity)
        last = last_checkpoint(folder)
    state = read_state(last) if last is not None else None
    if state is not None and is_finished(state, settings):
        load_best(module, folder, state)
        return history_of(module, state)
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Adam with weight decay in the gradient, as in the paper's code; not AdamW.
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
    # This package prints progress and metrics itself.
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
        """Return the metrics of each row, but no loss: the Trainer would average batches of unequal size."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            metrics = model(**inputs)["metrics"].float()
        return None, metrics, torch.zeros(metrics.shape[0], device=metrics.device)


class _Averages:
    """Means of the metrics over the held-out data.

    The metrics are numbered, because a name might have a special meaning to the Trainer.
    """

    def __init__(self, module: TrainedModule) -> None:
        self._num_loss_metrics = module.num_loss_metrics

    def __call__(self, found: Any) -> dict[str, float]:
        means = found.predictions.astype("float64").mean(axis=0)
        loss = float(means[: self._num_loss_metrics].sum())
        return {"loss": loss, **{f"metric_{index}": float(mean) for index, mean in enumerate(means)}}


class _Watch(transformers.TrainerCallback):
    """Clips gradients, rejects gradients that are not finite, reports held-out losses and stops early."""

    def __init__(self, module: TrainedModule, settings: Optimisation, progress: Progress) -> None:
        self._module = module
        self._settings = settings
        self._progress = progress

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Clip each submodule separately, so that plugins trained together do not affect each other."""
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
        """Report the metrics, and stop if patience has run out."""
        del args
        point = loss_point(self._module, {**context["metrics"], "step": state.global_step})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in point.metrics.items())
        self._progress.note(f"step {state.global_step}: held-out data: {shown}")
        if is_out_of_patience(state.log_history, self._settings):
            control.should_training_stop = True


class _Bar(transformers.TrainerCallback):
    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Advance the bar by the steps that an earlier run trained."""
        del args, control, context
        for _ in range(state.global_step):
            self._advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Advance the bar by one step."""
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


def _arguments(
    module: TrainedModule, settings: Optimisation, folder: Path, batch_size: int
) -> transformers.TrainingArguments:
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
        ddp_find_unused_parameters=not module.uses_all_parameters,
    )


def _schedule(settings: Optimisation) -> Callable[[int], float]:
    """Return a function that maps a step to its learning rate, as a share of the peak learning rate."""

    def share(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        if settings.schedule == "constant":
            return 1.0
        return max(0.0, (settings.steps - step) / max(1, settings.steps - settings.warmup_steps))

    return share


def _refuse_out_of_memory(settings: Optimisation, error: Exception) -> None:
    """Raise a readable error if memory ran out. On a CPU, torch has no dedicated error for this."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise UserError(
            f"There is not enough memory for batches of {settings.batch_size} texts.",
            "Use a smaller --batch-size or shorter texts (--max-tokens) with --restart, or more processes.",
        ) from error


def _refuse_full_disk(folder: Path, num_bytes: int, error: Exception) -> None:
    """Raise the operating system's own error if a checkpoint cannot be written.

    torch and safetensors report a full disk with generic errors.
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
