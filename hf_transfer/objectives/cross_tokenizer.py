"""Distillation from a teacher whose tokenizer is not the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from hf_transfer.data.teacher_tokens import TEACHER_COLUMNS, TEACHER_MASK
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives.base import Objective
from hf_transfer.schedules import Schedule
from hf_transfer.tasks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SORTED_AT_ONCE = 1 << 24  # probabilities; a few times 64 MB while they are compared


def universal_logit_distance(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """``sum_i |p_(i) - q_(i)|`` over ranks, ``p_(1) >= p_(2) >= ...`` the student's probabilities, ``q`` the teacher's.

    The smaller vocabulary is filled up with zeros (ULD: Boizard et al. 2024, eq. 3). It is the Wasserstein distance of
    two distributions if moving between any two tokens costs the same, minimised over who is who: 0 for a permutation,
    2 at most. It compares how sure the models are, and of how many choices, not of which.

    Rows are sorted in full: over 128,256 tokens that is a quarter of the time of the head that made the logits (hidden
    size 2048, one core), and the leading ranks alone would miss most of what an untrained student spreads out. It is
    done some rows at a time in float32 (float64 stays), and the gradient is computed on the way, so that one matrix of
    the logits' size and type is kept for the backward pass instead of probabilities, ranks and differences.

    Args:
        student_logits: (N, V_student).
        teacher_logits: (N, V_teacher); no gradient flows there.
        temperature: Both logits are divided by it.

    Returns:
        (N,), in float32 or wider.
    """
    return _SortedDistance.apply(student_logits, teacher_logits, temperature)


def span_log_probabilities(logits: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``sum_t log p(token_t | tokens_<t)`` over the tokens between neighbouring ``positions``: of a span of text, cut
    by one tokenizer or the other, the probability that each model gives it.

    Args:
        logits: (B, T, V); those at t predict token t + 1.
        input_ids: (B, T).
        positions: (B, A), increasing in each row and then filled up with -1. Span k holds the tokens
            ``positions[k] + 1`` to ``positions[k + 1]``.

    Returns:
        (B, A - 1); 0 where there is no span.
    """
    rows, length = input_ids.shape
    each = -cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    bounds = positions.masked_fill(positions < 0, length)
    tokens = torch.arange(1, length, device=positions.device).expand(rows, -1)
    span = torch.searchsorted(bounds, tokens.contiguous())  # 0: before the first position; A: after the last
    sums = each.new_zeros(rows, positions.shape[1] + 1).scatter_add(1, span, each.view(rows, -1))
    return sums[:, 1:-1]


class _SortedDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        distance = student.new_empty(len(student), dtype=precise)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        shared = min(student.shape[1], teacher.shape[1])
        rows = max(1, _SORTED_AT_ONCE // max(student.shape[1], teacher.shape[1]))
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            ours, order = _sorted_probabilities(student[chunk], temperature, precise)
            theirs, _ = _sorted_probabilities(teacher[chunk], temperature, precise)
            difference = ours.clone()
            difference[:, :shared] -= theirs[:, :shared]
            distance[chunk] = difference.abs().sum(1) + theirs[:, shared:].sum(1)
            if gradient is not None:
                slope = difference.sign_()
                slope -= (ours * slope).sum(1, keepdim=True)
                gradient[chunk].scatter_(1, order, (ours * slope / temperature).to(student.dtype))
        ctx.save_for_backward(gradient)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


def _sorted_probabilities(
    logits: torch.Tensor, temperature: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return (logits.to(dtype) / temperature).softmax(dim=1).sort(dim=1, descending=True)
