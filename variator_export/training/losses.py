"""The terms of the loss. Each gives a value for each row of a batch; the loss is their mean.

A row counts the same whatever its length and whatever else is in its batch, so that the mean over the
processes of a distributed run is the mean over the whole batch.

Shapes: B batch, S tokens, d hidden size, C classes.
"""

from torch import Tensor
from torch.nn import functional


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden vectors (B, S, d), without padding (mask (B, S)); (B,).

    The loss of the paper's code (thunlp/Compression-Plugin at b1216c0).
    """
    return _mean_of_tokens((student.float() - teacher.float()).square().mean(-1), mask)


def relative_hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """`hidden_loss` over the teacher's mean square, so that layers of any scale weigh the same; (B,)."""
    return hidden_loss(student, teacher, mask) / _mean_of_tokens(teacher.float().square().mean(-1), mask)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the rows of two (B, d); (B,)."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's class probabilities, logits (B, C); (B,)."""
    log_student = functional.log_softmax(student.float(), dim=-1)
    log_teacher = functional.log_softmax(teacher.float(), dim=-1)
    return functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) with class indices (B,); (B,)."""
    return functional.cross_entropy(student.float(), labels, reduction="none")


def _mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(B, S) to (B,)."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1)
