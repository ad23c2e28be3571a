"""The loss of a few rows of logits, which it turns into their own gradient in place."""

from __future__ import annotations

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


def cross_entropy_block(terms: Terms, scratch: Tensor, logits: Tensor, labels: Tensor, _: None) -> BlockValues:
    """The cross-entropy alone, of logits (b, V) and labels (b, 1); ``scratch`` is room for one block, (1, b, V)."""
    q, normalizer = _softmax(logits, out=scratch[0, : len(logits)])
    cross_entropy = normalizer - logits.gather(-1, labels)
    logits.copy_(q).scatter_add_(-1, labels, torch.full_like(normalizer, -1))
    unit = torch.full_like(cross_entropy, terms.task_weight)
    return BlockValues(cross_entropy, torch.zeros_like(cross_entropy), unit)


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

    With q = softmax(z), the teacher's p and c = teacher_weight * factor / T, the gradient in z is
    ``task_weight (u - [label]) + c (q - p)``, where u = softmax(T z): that is q where T is 1, and ``q^2 / sum q^2``
    where T is 2, so that one exponential serves both terms.

    Args:
        terms: What to sum.
        scratch: Room for two blocks, (2, b, V); one is enough where the target holds no logits.
        logits: (b, V), overwritten.
        labels: (b, 1).
        target: Logits (b, V), overwritten; or stored targets of b rows.
    """
    power, pull = terms.temperature, terms.teacher_weight * terms.factor / terms.temperature
    q, normalizer = _softmax(logits, out=scratch[0, : len(logits)])
    at_label = logits.gather(-1, labels)
    if isinstance(target, TopK):
        tail = _tail(q, target.ids)
        if tail is not None and bool((tail < 1e4 * logits.shape[-1] * torch.finfo(q.dtype).tiny).any()):
            return autograd_block(terms, logits.mul_(power), labels, target)  # in log space: the rest underflows
        soft = _top_k_target(target, logits, q, normalizer, tail)
    elif isinstance(target, Samples):
        soft = _sampled_target(target, logits, q, normalizer)
    else:
        soft = _logits_target(target.to(logits.dtype), logits, q, normalizer, scratch[1, : len(logits)])
    total, task_normalizer = torch.ones_like(normalizer), normalizer
    if power == 2:
        total = torch.pow(q, 2, out=logits).sum(-1, keepdim=True)
        task_normalizer = total.log() + 2 * normalizer
    elif power == 1:
        logits.copy_(q)
    else:
        task, task_normalizer = _softmax(logits.mul_(power), out=torch.empty_like(logits))
        logits.copy_(task)
    cross_entropy = task_normalizer - power * at_label
    if not terms.differentiate:
        return BlockValues(cross_entropy, soft.value, total)
    if terms.task_weight:
        unit = terms.task_weight / total
        soft.add_to(logits, pull / unit)
        logits.scatter_add_(-1, labels, -total)
    else:
        unit = torch.full_like(total, pull)
        soft.add_to(logits.zero_(), torch.ones_like(total))
    return BlockValues(cross_entropy, soft.value, unit)


class _SoftTarget(NamedTuple):
    """A teacher's side of the forward KL.

    Args:
        value: The divergence (b, 1).
        add_to: Adds its gradient, times ``weight`` (b, 1), to a gradient (b, V).
    """

    value: Tensor
    add_to: Callable[[Tensor, Tensor], Any]


def _logits_target(
    teacher_logits: Tensor, logits: Tensor, q: Tensor, normalizer: Tensor, scratch: Tensor
) -> _SoftTarget:
    p, teacher_normalizer = _softmax(teacher_logits, out=scratch)
    gap = teacher_logits.sub_(logits).mul_(p).sum(-1, keepdim=True)

    def add_to(gradient: Tensor, weight: Tensor) -> None:
        gradient.addcmul_(q, weight).addcmul_(p, weight, value=-1)

    return _SoftTarget(gap - teacher_normalizer + normalizer, add_to)


def _tail(q: Tensor, ids: Tensor) -> Tensor | None:
    """What q (b, V) has beside ``ids``, (b, 1), summed without cancellation; nothing where they are all tokens."""
    if ids.shape[-1] == q.shape[-1]:
        return None
    at_ids = q.gather(-1, ids)
    tail = q.scatter_(-1, ids, 0).sum(-1, keepdim=True)
    q.scatter_(-1, ids, at_ids)
    return tail


def _top_k_target(target: TopK, logits: Tensor, q: Tensor, normalizer: Tensor, tail: Tensor | None) -> _SoftTarget:
    """The tail pulls at its tokens by ``p_tail q_v / q_tail``, which is written to the K tokens too and then over, for
    what it is there can be many times larger than what belongs there."""
    log_q, log_p = logits.gather(-1, target.ids) - normalizer, target.log_probabilities.to(logits.dtype)
    if tail is not None:
        log_q = torch.cat([log_q, tail.log()], -1)
        log_p = torch.cat([log_p, target.tail_log_probability.unsqueeze(-1).to(logits.dtype)], -1)
    p = log_p.softmax(-1)
    k = target.ids.shape[-1]
    difference = log_q[:, :k].exp() - p[:, :k]
    share = 1.0 if tail is None else 1 - p[:, k:] / tail

    def add_to(gradient: Tensor, weight: Tensor) -> None:
        at_ids = gradient.gather(-1, target.ids)
        gradient.addcmul_(q, share * weight).scatter_(-1, target.ids, at_ids + weight * difference)

    return _SoftTarget(known_divergence(p, log_q).unsqueeze(-1), add_to)


def _sampled_target(target: Samples, logits: Tensor, q: Tensor, normalizer: Tensor) -> _SoftTarget:
    weights = target.weights.to(logits.dtype)
    total = weights.sum(-1, keepdim=True)
    surprise = normalizer - logits.gather(-1, target.ids)
    value = (weights * surprise).sum(-1, keepdim=True) - target.entropy.unsqueeze(-1).to(logits.dtype)

    def add_to(gradient: Tensor, weight: Tensor) -> None:
        gradient.addcmul_(q, total * weight).scatter_add_(-1, target.ids, -weight * weights)

    return _SoftTarget(value, add_to)


def _softmax(logits: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) in ``out``, and log sum exp(z), (b, 1)."""
    highest = logits.amax(-1, keepdim=True)
    torch.softmax(logits, -1, out=out)
    return out, highest - out.amax(-1, keepdim=True).log()
