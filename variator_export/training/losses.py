"""The terms of the loss. Each term returns one value per row of a batch; the loss is the mean over the rows.

Every row has the same weight, whatever its length and whatever else is in the batch. The mean over the
processes of a distributed run is therefore the mean over the whole batch.

Shapes: B batch, S tokens, T tokens of the target text, d hidden size, C classes.
"""

from torch import Tensor
from torch.nn import functional

# The label of padding after the target text, as in transformers.
IGNORED = -100
# Less attention is not told apart, so that no gradient is as large as its inverse.
_LEAST_ATTENTION = 1e-6


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared error of hidden vectors (B, S, d) without padding (mask (B, S)); returns (B,).

    This is the loss of the paper's code (thunlp/Compression-Plugin at b1216c0).
    """
    return _mean_of_tokens((student.float() - teacher.float()).square().mean(-1), mask)


def relative_hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Divide `hidden_loss` by the teacher's mean square, so that layers of any scale weigh the same; (B,)."""
    return hidden_loss(student, teacher, mask) / _mean_of_tokens(teacher.float().square().mean(-1), mask)


def token_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Average values (B, T) over the tokens of the target text, whose labels (B, T) are not -100; (B,)."""
    return _mean_of_tokens(values, labels != IGNORED)


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence from the teacher's attention; returns (B,).

    Both are (B, heads, queries, keys). It is averaged over the heads, and over the queries without padding
    (mask (B, queries)).
    """
    teacher, student = (values.float().clamp_min(_LEAST_ATTENTION) for values in (teacher, student))
    divergence = (teacher * (teacher.log() - student.log())).sum(-1)
    return _mean_of_tokens(divergence.mean(1), mask)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cosine of the rows of two tensors (B, d); returns (B,)."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence from the teacher's class probabilities.

    Both arguments are logits (B, C); returns (B,). For logits (B, T, C) of a text's tokens, (B, T).
    """
    log_student = functional.log_softmax(student.float(), dim=-1)
    log_teacher = functional.log_softmax(teacher.float(), dim=-1)
    return functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of logits (B, C) with class indices (B,); returns (B,).

    For logits (B, T, C) of a text's tokens and token ids (B, T), (B, T), which is 0 where a label is -100.
    """
    classes_second = student.float().movedim(-1, 1)
    return functional.cross_entropy(classes_second, labels, reduction="none", ignore_index=IGNORED)


def _mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Average values (B, S) over the tokens that are not masked; returns (B,)."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1)
