"""What is trained."""

from torch import nn


class TrainedModule(nn.Module):
    """A module that `trainer.fit` trains.

    Its forward gives `loss`, a mean over the rows of a batch, and `metrics`, the values of each row, (B,
    number of metrics): what a batch spread over processes gives is then what it gives in one.

    Attributes:
        metric_names: Of the metrics.
        num_loss_metrics: The loss is the sum of so many of them, the first.
        clipped: The parts whose gradients are clipped apart.
    """

    # The Trainer is not to scale the loss by the number of labels: it is a mean already.
    accepts_loss_kwargs = False
    metric_names: tuple[str, ...]
    num_loss_metrics: int
    clipped: tuple[nn.Module, ...]
