"""What adversarial domain adaptation is made of: pure functions of features (N, D) and predictions (N, C)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """``features`` themselves, through which a gradient passes backward times ``-strength``.

    What is computed from the result learns to lower its loss, what ``features`` were computed from learns to raise it.

    Args:
        features: Any shape.
        strength: lambda; 0 lets nothing through.

    References:
        Ganin & Lempitsky 2015, Unsupervised Domain Adaptation by Backpropagation, eq. 17 and 18.
    """
    return _ReverseGradient.apply(features, strength)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def multilinear_map(features: Tensor, predictions: Tensor, projections: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Features conditioned on predictions: their outer product (N, D C), or a random map of it (N, R).

    Args:
        features: f (N, D).
        predictions: g (N, C), probabilities.
        projections: ``(R_f, R_g)``, (D, R) and (C, R) with standard normal entries: the randomised map
            ``(f R_f) * (g R_g) / sqrt(R)`` keeps inner products in expectation, for D C too large to hold.

    References:
        Long et al. 2018, Conditional Adversarial Domain Adaptation, eq. 5 and 6.
    """
    if projections is None:
        return (predictions.unsqueeze(2) * features.unsqueeze(1)).flatten(1)
    of_features, of_predictions = projections
    return (features @ of_features) * (predictions @ of_predictions) / math.sqrt(of_features.shape[1])


def certainty_weight(predictions: Tensor) -> Tensor:
    """``1 + exp(-H(g))``, between 1 and 2: examples whose class is certain count more, (N,).

    Args:
        predictions: g (N, C), probabilities.

    References:
        Long et al. 2018, Conditional Adversarial Domain Adaptation, section 3.3 (CDAN+E).
    """
    return 1 + torch.exp(torch.special.entr(predictions).sum(-1).neg())
