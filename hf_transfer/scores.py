"""What can be known of a target without its labels: domain distance, and how good a model is there."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_transfer.errors import ConfigurationError

FOLDS = 2
LARGEST_WEIGHT = 1e4  # of one example: a classifier that is sure of every domain gives no ratio


def target_probability(source: Tensor, target: Tensor, *, seed: int = 0) -> Tensor:
    """How probably each example (N + M,) is the target's, by a classifier that was fitted without it.

    Two folds of a logistic regression on standardised features, to which both domains count alike.

    Args:
        source: Features (N, D).
        target: Features (M, D).
        seed: Of the folds.

    Raises:
        ConfigurationError: Shapes that do not fit, fewer than two examples in a domain, or features that are no
            numbers.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if (
        source.dim() != 2
        or target.dim() != 2
        or source.shape[1] != target.shape[1]
        or min(len(source), len(target)) < 2
    ):
        raise ConfigurationError(
            f"source and target have the shapes {tuple(source.shape)} and {tuple(target.shape)}: expected (N, D) and "
            "(M, D), with at least 2 examples each."
        )
    features = torch.cat([source, target]).detach().double().cpu()
    if not torch.isfinite(features).all():
        raise ConfigurationError("source and target: there are features that are no finite numbers.")
    domain = np.repeat([0, 1], [len(source), len(target)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=200))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    probabilities = cross_val_predict(classifier, features.numpy(), domain, cv=folds, method="predict_proba")
    return torch.from_numpy(probabilities[:, 1])


def proxy_a_distance(source: Tensor, target: Tensor, *, seed: int = 0, probability: Tensor | None = None) -> float:
    """How well a linear classifier tells two domains apart: ``2 (1 - 2 error)``, 0 where it cannot, 2 where it always
    can.

    The error is that on held-out examples, both domains counted alike.

    Args:
        source: Features (N, D).
        target: Features (M, D).
        seed: See :func:`target_probability`.
        probability: What that gave, if it is known already.

    Returns:
        Between 0 and 2; an error above one half counts as one half.

    Raises:
        ConfigurationError: As for :func:`target_probability`.

    References:
        Ben-David et al. 2007, Analysis of Representations for Domain Adaptation. Ganin et al. 2016, section 5.
    """
    guess = target_probability(source, target, seed=seed) if probability is None else probability
    wrong = [float((guess[: len(source)] > 0.5).double().mean()), float((guess[len(source) :] <= 0.5).double().mean())]
    return max(0.0, 2 * (1 - 2 * sum(wrong) / 2))


def density_ratios(source: Tensor, target: Tensor, *, seed: int = 0, probability: Tensor | None = None) -> Tensor:
    """How much likelier each source example's features are in the target, (N,), by a domain classifier's odds.

    Args:
        source: Features (N, D).
        target: Features (M, D).
        seed: See :func:`target_probability`.
        probability: What that gave, if it is known already.

    Raises:
        ConfigurationError: As for :func:`target_probability`.

    References:
        Bickel et al. 2007. You et al. 2019, Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation,
        section 3.2.
    """
    guess = target_probability(source, target, seed=seed) if probability is None else probability
    guess = guess[: len(source)]
    return (guess / (1 - guess)).clamp(max=LARGEST_WEIGHT)


def importance_weighted_risk(losses: Tensor, ratios: Tensor) -> float:
    """The risk on the target, from losses on the source: ``mean(w loss)``; lower is better.

    Args:
        losses: Of source validation examples (N,).
        ratios: Their density ratios (N,).

    References:
        Sugiyama et al. 2007, Covariate Shift Adaptation by Importance Weighted Cross Validation.
    """
    return float((ratios * losses.detach().to(ratios.dtype)).mean())


def deep_embedded_risk(losses: Tensor, ratios: Tensor) -> float:
    """The importance-weighted risk with a control variate, which takes out what the ratios' own spread adds; lower is
    better.

    ``mean(w loss) + eta mean(w) - eta`` with ``eta = -Cov(w loss, w) / Var(w)``.

    Args:
        losses: Of source validation examples (N,).
        ratios: Their density ratios (N,).

    References:
        You et al. 2019, Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation, algorithm 1.
    """
    weighted = ratios * losses.detach().to(ratios.dtype)
    spread = ratios.var()
    if not spread > 0:
        return float(weighted.mean())
    eta = -((weighted - weighted.mean()) * (ratios - ratios.mean())).sum() / (len(ratios) - 1) / spread
    return float(weighted.mean() + eta * ratios.mean() - eta)


def mean_entropy(logits: Tensor) -> float:
    """The mean entropy of the predictions in nats; lower means more certain, which a collapsed model is too.

    Args:
        logits: Of target examples (N, C).

    References:
        Morerio et al. 2018, Minimal-Entropy Correlation Alignment, section 3.3.
    """
    return float(torch.special.entr(logits.detach().double().softmax(-1)).sum(-1).mean())


def soft_neighborhood_density(logits: Tensor, *, temperature: float = 0.05) -> float:
    """How many alike each target example has: the mean entropy of its similarities to all others; higher is better.

    Args:
        logits: Of target examples (N, C), N at least 2.
        temperature: Of the similarities; 0.05 is the paper's.

    Raises:
        ConfigurationError: Fewer than two examples.

    References:
        Saito et al. 2021, Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood
        Density, eq. 1 to 3.
    """
    if len(logits) < 2:
        raise ConfigurationError(f"soft_neighborhood_density: {len(logits)} examples, expected at least 2.")
    directions = torch.nn.functional.normalize(logits.detach().double().softmax(-1), dim=-1)
    total = 0.0
    for first in range(0, len(directions), 1024):
        similar = directions[first : first + 1024] @ directions.t() / temperature
        similar[torch.arange(len(similar)), torch.arange(first, first + len(similar))] = -torch.inf
        total += float(torch.special.entr(similar.softmax(-1)).sum())
    return total / len(directions)
