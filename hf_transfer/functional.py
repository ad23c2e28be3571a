"""How far a student's distribution is from its teacher's: pure functions of logits, one value per position."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from hf_transfer.errors import ConfigurationError, nearest

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "logit_mse"]
"""The divergences by name; :func:`divergence` has their formulas."""


def check_divergence(kind: str, temperature: float, beta: float = 0.5) -> None:
    """Refuse what no divergence can be computed with.

    Raises:
        ConfigurationError: ``kind`` is not a :data:`Divergence`, ``temperature`` is not a positive number, or ``beta``
            lies outside (0, 1) for a Jensen-Shannon divergence.
    """
    if kind not in get_args(Divergence):
        raise ConfigurationError(f"'{kind}' is no divergence. {nearest(kind, get_args(Divergence))}")
    if not 0 < temperature < math.inf:
        raise ConfigurationError(f"The temperature is {temperature}: expected a number above 0, such as 2.0.")
    if kind == "jensen_shannon" and not 0 < beta < 1:
        raise ConfigurationError(
            f"beta is {beta}: expected a number between 0 and 1, both left out, for the Jensen-Shannon divergence is "
            "zero at its ends. What it tends to there, once divided by beta or 1 - beta, is 'forward_kl' (0) and "
            "'reverse_kl' (1)."
        )


def temperature_factor(kind: Divergence, temperature: float) -> float:
    """What the divergence is multiplied by so that its gradient keeps its size when the temperature T changes.

    Dividing both logits by T divides the gradient of a Kullback-Leibler divergence by T twice (once by the chain
    rule, once because the two distributions draw together), hence T^2 (Hinton et al. 2015, section 2); of a total
    variation by T once, for the sign of the difference does not shrink, hence T; the logit MSE knows no temperature.
    """
    return {"total_variation": temperature, "logit_mse": 1.0}.get(kind, temperature**2)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """How far the student's distribution Q = softmax(s / T) is from the teacher's P = softmax(t / T), per position.

    ====================  =================================================================  ==========
    ``kind``              value                                                              unit
    ====================  =================================================================  ==========
    ``forward_kl``        KL(P || Q) = sum P log(P / Q): Q covers all that P does            nats
    ``reverse_kl``        KL(Q || P): Q keeps to where P is large                            nats
    ``jensen_shannon``    beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1-beta) Q   nats
    ``total_variation``   1/2 sum abs(P - Q), in [0, 1]                                      none
    ``logit_mse``         mean of (s - t)^2 over the vocabulary, whatever T                  logits^2
    ====================  =================================================================  ==========

    The generalised Jensen-Shannon divergence is that of Agarwal et al. 2024 (GKD, eq. 1): bounded, zero for
    ``beta`` = 0 and 1, with KL(P || Q) as its limit over ``beta`` at 0 and KL(Q || P) as its limit over ``1 - beta``
    at 1. At 1/2 it is the symmetric one. The factor that makes up for the temperature is left to
    :func:`temperature_factor`.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V); differentiable too, so detach what shall not learn.
        kind: One of :data:`Divergence`.
        temperature: T; 1 compares the distributions that the models predict.
        beta: The teacher's share in the mixture M; read by ``jensen_shannon`` only.

    Returns:
        (...), in float32 whatever the logits' precision; float64 stays float64.

    Raises:
        ConfigurationError: Unknown ``kind``, a temperature or ``beta`` out of range, or logits of different shapes.
    """
    check_divergence(kind, temperature, beta)
    if student_logits.shape != teacher_logits.shape:
        raise ConfigurationError(
            f"The student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}: expected the same. Where the teacher's vocabulary is longer by padding, "
            "keep the tokens both have."
        )
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    if kind == "logit_mse":
        return (student - teacher).square().mean(-1)
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if kind == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def bernoulli_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """The mean over labels of the divergence between two yes-no distributions sigmoid(t / T) and sigmoid(s / T).

    For heads whose labels are independent (multi-label classification): the mean is the one that
    ``BCEWithLogitsLoss`` takes, so that the two losses weigh alike. Arguments, units and errors are those of
    :func:`divergence`, with (..., K) logits of K labels; ``logit_mse`` is the same in both.
    """
    if kind == "logit_mse":
        return divergence(student_logits, teacher_logits, kind=kind)
    student, teacher = (torch.stack([x, torch.zeros_like(x)], -1) for x in (student_logits, teacher_logits))
    return divergence(student, teacher, kind=kind, temperature=temperature, beta=beta).mean(-1)


def top_k_divergence(
    student_logits: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    tail_log_probability: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Forward KL of a teacher known by its K most probable tokens and the mass of all the others.

    ``sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail)``: the divergence of the two distributions once the
    tokens outside ``ids`` are taken for one. It is a lower bound of the full divergence, never negative (dropping the
    tail instead is neither), and equals it for K = V.

    The student's tail is summed over the tokens themselves, in log space: ``1 - sum_k q_k`` would have lost all
    its digits where the K tokens hold nearly everything. Probabilities rounded in storage are made to sum to one.

    Args:
        student_logits: (..., V), before the temperature.
        ids: (..., K), all different.
        log_probabilities: (..., K), in nats, already at ``temperature``.
        tail_log_probability: (...), likewise; -inf for none.
        temperature: That of student and teacher.

    Returns:
        (...), in nats, float32 (float64 stays float64), without the temperature's factor.
    """
    check_divergence("forward_kl", temperature)
    log_q = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    log_p, known = log_probabilities.to(log_q.dtype), log_q.gather(-1, ids)
    if ids.shape[-1] < log_q.shape[-1]:
        tail = log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        log_p, known = torch.cat([log_p, tail_log_probability[..., None].to(log_p)], -1), torch.cat([known, tail], -1)
    return known_divergence(log_p.softmax(-1), known)


def sampled_divergence(
    student_logits: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL of a teacher known by M weighted draws: ``sum_m w_m (-log q(ids_m)) - H(p)``.

    Unbiased in value and gradient when a token's weights add up to its probability on average (Anshumann et al. 2025,
    Sparse Logit Sampling); a single position's value may therefore be negative.

    Args:
        student_logits: (..., V), before the temperature.
        ids: (..., M) tokens drawn from the teacher at ``temperature``, with repetition.
        weights: (..., M).
        entropy: H(p) (...) of the teacher at ``temperature``, in nats: shifts the value, not the gradient.
        temperature: That of student and teacher.

    Returns:
        (...), in nats, float32 (float64 stays float64), without the temperature's factor.
    """
    check_divergence("forward_kl", temperature)
    log_q = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    return -(weights.to(log_q.dtype) * log_q.gather(-1, ids)).sum(-1) - entropy.to(log_q.dtype)


def known_divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """``sum p log(p / q)`` over the last axis, where p may be zero; rounding does not make it negative."""
    return -(torch.special.entr(p) + p * log_q).sum(-1).clamp_max(0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is where its precision is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
