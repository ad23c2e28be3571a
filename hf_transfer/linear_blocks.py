"""The loss of a few rows of logits, which it turns into their own gradient in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_transfer.functional import Divergence, divergence, known_divergence, temperature_factor, top_k_divergence
from hf_transfer.targets import Samples, TopK


class BlockValues(NamedTuple):
    """What a block of rows comes to, (b, 1) each.

    Args:
        cross_entropy: In nats.
        divergence: Without the temperature's factor.
        unit: What the gradient that has replaced the logits is to be multiplied by, row by row.
    """

    cross_entropy: Tensor
    divergence: Tensor
    unit: Tensor


BlockLoss = Callable[[Tensor, Tensor, Any], BlockValues]
"""Takes logits (b, V), which become their gradient, labels (b, 1) and what is known of the teacher."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The two terms of the loss and their weights."""

    task_weight: float
    teacher_weight: float
    temperature: float
    kind: Divergence
    beta: float
    differentiate: bool

    @property
    def factor(self) -> float:
        """The temperature's."""
        return temperature_factor(self.kind, self.temperature)


def cross_entropy_block(terms: Terms, logits: Tensor, labels: Tensor, _: None) -> BlockValues:
    """The cross-entropy alone, of logits (b, V) and labels (b, 1)."""
    logits.sub_(logits.amax(-1, keepdim=True))
    at_label = logits.gather(-1, labels)
    total = logits.clamp_min_(_floor(logits)).exp_().sum(-1, keepdim=True)
    logits.scatter_add_(-1, labels, -total)
    return BlockValues(total.log() - at_label, torch.zeros_like(total), terms.task_weight / total)


def autograd_block(terms: Terms, logits: Tensor, labels: Tensor, target: Tensor | TopK) -> BlockValues:
    """Any divergence from teacher logits (b, Vt), over their Vt <= V tokens, or from a stored top k, by autograd."""
    with torch.set_grad_enabled(terms.differentiate):
        student_logits = logits.detach().requires_grad_()
        cross_entropy = functional.cross_entropy(student_logits, labels.squeeze(-1), reduction="none")
        if isinstance(target, TopK):
            soft = top_k_divergence(student_logits, *target, temperature=terms.temperature)
        else:
            soft = divergence(
                student_logits[:, : target.shape[-1]],
                target,
                kind=terms.kind,
                temperature=terms.temperature,
                beta=terms.beta,
            )
        if terms.differentiate:
            total = terms.task_weight * cross_entropy + terms.teacher_weight * terms.factor * soft
            (gradient,) = torch.autograd.grad(total.sum(), student_logits)
            logits.copy_(gradient)
    cross_entropy, soft = cross_entropy.detach().unsqueeze(-1), soft.detach().unsqueeze(-1)
    return BlockValues(cross_entropy, soft.to(cross_entropy.dtype), torch.ones_like(cross_entropy))


def forward_kl_block(
    terms: Terms, scratch: Tensor, logits: Tensor, labels: Tensor, target: Tensor | TopK | Samples
) -> BlockValues:
    """Forward KL and cross-entropy of logits z that come divided by T, as a teacher's do where they are the target.

    One exponential e = exp(z / T) serves the divergence and, as e^T, the cross-entropy where T is 1 or 2. With
    E = sum e, U = sum e^T, c = teacher_weight * factor / T and the teacher's p, the gradient in z is
    ``task_weight (e^T / U - [label]) + c (e / E - p)``: in units of ``task_weight / U`` e^T needs no further pass.

    Args:
        terms: What to sum.
        scratch: Room for two blocks, (2, b, V); one is enough where the target holds no logits.
        logits: (b, V), overwritten.
        labels: (b, 1).
        target: Logits (b, V), overwritten; or stored targets of b rows.
    """
    power, pull = terms.temperature, terms.teacher_weight * terms.factor / terms.temperature
    floor = _floor(logits, products=2 if power == 2 else 1)
    soft_exp = _exp(logits, floor, out=scratch[0, : len(logits)])
    soft_total = soft_exp.sum(-1, keepdim=True)
    at_label = logits.gather(-1, labels)
    if isinstance(target, TopK):
        tail = _tail(soft_exp, target.ids)
        if tail is not None and bool((tail < 1e4 * logits.shape[-1] * math.exp(floor)).any()):
            return autograd_block(terms, logits.mul_(power), labels, target)  # in log space: the floor would show
        soft = _top_k_target(target, logits, soft_total, tail, power if terms.task_weight else None)
    elif isinstance(target, Samples):
        soft = _sampled_target(target, logits, soft_total)
    else:
        soft = _logits_target(target.to(logits.dtype), logits, soft_total, floor, scratch[1, : len(logits)])
    if power in (1, 2):
        torch.pow(soft_exp, power, out=logits)
    else:
        logits.mul_(power).clamp_min_(floor).exp_()
    task_total = logits.sum(-1, keepdim=True)
    cross_entropy = task_total.log() - power * at_label
    if not terms.differentiate:
        return BlockValues(cross_entropy, soft.value, soft_total)
    if terms.task_weight:
        unit, weight = terms.task_weight / task_total, pull / terms.task_weight * task_total
    else:
        unit, weight = pull / soft_total, soft_total
        logits.zero_()
    logits.add_(soft_exp.mul_(soft.share * weight / soft_total))
    soft.subtract(logits, weight)
    if terms.task_weight:
        logits.scatter_add_(-1, labels, -task_total)
    return BlockValues(cross_entropy, soft.value, unit)


class _SoftTarget(NamedTuple):
    """A teacher's side of the forward KL.

    Args:
        value: The divergence (b, 1).
        share: What q is multiplied by in the gradient ``share q - p``.
        subtract: Subtracts ``weight`` times p from a gradient (b, V).
    """

    value: Tensor
    share: Tensor | float
    subtract: Callable[[Tensor, Tensor], Any]


def _logits_target(
    teacher_logits: Tensor, logits: Tensor, soft_total: Tensor, floor: float, scratch: Tensor
) -> _SoftTarget:
    exp = _exp(teacher_logits, floor, out=scratch)
    total = exp.sum(-1, keepdim=True)
    gap = teacher_logits.sub_(logits).mul_(exp).sum(-1, keepdim=True) / total
    value = gap + (soft_total / total).log()
    return _SoftTarget(value, 1.0, lambda gradient, weight: gradient.sub_(exp.mul_(weight / total)))


def _tail(soft_exp: Tensor, ids: Tensor) -> Tensor | None:
    """What is left of the sum of ``soft_exp`` without ``ids``, (b, 1); nothing where they are the whole vocabulary."""
    if ids.shape[-1] == soft_exp.shape[-1]:
        return None
    at_ids = soft_exp.gather(-1, ids)
    tail = soft_exp.scatter_(-1, ids, 0).sum(-1, keepdim=True)
    soft_exp.scatter_(-1, ids, at_ids)
    return tail


def _top_k_target(
    target: TopK, logits: Tensor, soft_total: Tensor, tail: Tensor | None, power: float | None
) -> _SoftTarget:
    """The tail's pull, ``p_tail q_v / q_tail``, is part of the share of q; the K tokens are then written over, for
    what the share puts there can be many times larger than what belongs there."""
    at_ids = logits.gather(-1, target.ids)
    log_q, log_p = at_ids - soft_total.log(), target.log_probabilities.to(logits.dtype)
    if tail is not None:
        log_q = torch.cat([log_q, (tail / soft_total).log()], -1)
        log_p = torch.cat([log_p, target.tail_log_probability.unsqueeze(-1).to(logits.dtype)], -1)
    p = log_p.softmax(-1)
    k = at_ids.shape[-1]
    difference = log_q[:, :k].exp() - p[:, :k]
    task_exp = (at_ids * power).exp() if power else 0
    return _SoftTarget(
        known_divergence(p, log_q).unsqueeze(-1),
        1.0 if tail is None else 1 - p[:, k:] * soft_total / tail,
        lambda gradient, weight: gradient.scatter_(-1, target.ids, task_exp + weight * difference),
    )


def _sampled_target(target: Samples, logits: Tensor, soft_total: Tensor) -> _SoftTarget:
    weights = target.weights.to(logits.dtype)
    surprise = soft_total.log() - logits.gather(-1, target.ids)
    value = (weights * surprise).sum(-1, keepdim=True) - target.entropy.unsqueeze(-1).to(logits.dtype)
    return _SoftTarget(
        value,
        weights.sum(-1, keepdim=True),
        lambda gradient, weight: gradient.scatter_add_(-1, target.ids, -weight * weights),
    )


def _exp(logits: Tensor, floor: float, out: Tensor) -> Tensor:
    """exp of the rows of ``logits``, from which their maxima are subtracted in place; of ``floor`` where below it."""
    logits.sub_(logits.amax(-1, keepdim=True))
    return torch.clamp(logits, min=floor, out=out).exp_()


def _floor(logits: Tensor, *, products: int = 1) -> float:
    """The exponent at which exponentials stop falling, so that ``products`` of them multiplied are a normal number.

    What lies below (e^-79 in float32, e^-39 for two) is no part of a sum that has a 1 in it; a subnormal number would
    cost the processor a hundred times a normal one.
    """
    return 0.9 / products * math.log(torch.finfo(logits.dtype).tiny)
