"""Base class of the modules that are trained."""

from torch import nn


class TrainedModule(nn.Module):
    """A module that `trainer.fit` trains.

    The forward pass returns `loss`, a mean over the rows of a batch, and `metrics`, the values of each row,
    (B, number of metrics). A batch that is distributed over processes therefore gives the same result as a
    batch in one process.

    Attributes:
        metric_names: Names of the metrics.
        num_loss_metrics: Number of leading metrics whose sum is the loss.
        clipped: Submodules whose gradients are clipped separately.
        uses_all_parameters: Whether every step computes a gradient of every parameter.
    """

    # The loss is already a mean, so the Trainer must not scale it by the number of labels.
    accepts_loss_kwargs = False
    uses_all_parameters = True
    metric_names: tuple[str, ...]
    num_loss_metrics: int
    clipped: tuple[nn.Module, ...]
