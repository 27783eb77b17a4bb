"""The terms of the loss. Each is the mean over the rows of a batch of a value for each row.

A row counts the same whatever its length, so that the mean over the processes of a distributed run is the
mean over the whole batch.

Shapes: B batch, S tokens, d hidden size, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden vectors (B, S, d), without padding (mask (B, S)).

    The loss of the paper's code (thunlp/Compression-Plugin at b1216c0).
    """
    squared = (student.float() - teacher.float()).square().mean(-1)  # (B, S)
    return _mean_of_tokens(squared, mask).mean()


def relative_hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """`hidden_loss` over the teacher's mean square, so that layers of any scale weigh the same."""
    return hidden_loss(student, teacher, mask) / hidden_loss(torch.zeros_like(teacher), teacher, mask)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the rows of two (B, d)."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's class probabilities, (B, C)."""
    log_student = functional.log_softmax(student.float(), dim=-1)
    log_teacher = functional.log_softmax(teacher.float(), dim=-1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) with class indices (B,)."""
    return functional.cross_entropy(student.float(), labels)


def _mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(B, S) to (B,)."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1)
