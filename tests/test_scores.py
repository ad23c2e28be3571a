"""Scores without target labels, on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_transfer.errors import ConfigurationError
from hf_transfer.scores import (
    deep_embedded_risk,
    density_ratios,
    importance_weighted_risk,
    mean_entropy,
    proxy_a_distance,
    soft_neighborhood_density,
)


def gaussians(shift: float, *, n: int = 4000, m: int = 4000, d: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(size, d, generator=generator) for size in (n, m))
    target[:, 0] += shift
    return source, target


def test_the_distance_is_that_of_the_best_linear_classifier():
    assert proxy_a_distance(*gaussians(0.0)) < 0.1
    error = 0.5 * math.erfc(1.0 / math.sqrt(2))  # halfway between means 2 apart
    assert proxy_a_distance(*gaussians(2.0)) == pytest.approx(2 * (1 - 2 * error), abs=0.05)
    assert proxy_a_distance(*gaussians(50.0)) == 2.0


def test_the_distance_counts_both_domains_alike():
    assert proxy_a_distance(*gaussians(0.0, n=4000, m=200)) < 0.2


@pytest.mark.parametrize("m", [4000, 1000])
def test_ratios_between_gaussians_are_the_closed_form(m):
    """p_t / p_s of N(1, 1) and N(0, 1) is exp(x - 1/2)."""
    source, target = gaussians(1.0, m=m, d=1)
    ratios = density_ratios(source, target)
    expected = torch.exp(source[:, 0].double() - 0.5)
    assert (ratios.log() - expected.log()).abs().mean() < 0.15
    assert ratios.mean().item() == pytest.approx(1.0, abs=0.1)


def test_weighted_risks_estimate_the_targets():
    source, target = gaussians(1.0, d=1)
    losses = source[:, 0].square()
    ratios = density_ratios(source, target)
    risk, controlled = importance_weighted_risk(losses, ratios), deep_embedded_risk(losses, ratios)
    assert losses.mean().item() == pytest.approx(1.0, abs=0.1)
    assert risk == pytest.approx(2.0, abs=0.35)  # E x^2 under N(1, 1)
    assert controlled == pytest.approx(2.0, abs=0.35)


def test_the_control_variate_is_the_papers_and_lowers_the_spread():
    generator = np.random.default_rng(0)
    plain, controlled = [], []
    for _ in range(300):
        x = torch.from_numpy(generator.normal(size=200))
        ratios, losses = torch.exp(x - 0.5), x.square()
        plain.append(importance_weighted_risk(losses, ratios))
        controlled.append(deep_embedded_risk(losses, ratios))
    covariance = np.cov((ratios * losses).numpy(), ratios.numpy(), ddof=1)
    eta = -covariance[0, 1] / covariance[1, 1]
    assert controlled[-1] == pytest.approx(plain[-1] + eta * ratios.mean().item() - eta)
    assert np.std(controlled) < 0.8 * np.std(plain)
    assert deep_embedded_risk(losses, torch.ones(200)) == pytest.approx(losses.mean().item())


def test_entropy_in_nats():
    assert mean_entropy(torch.zeros(3, 4)) == pytest.approx(math.log(4))
    assert mean_entropy(torch.tensor([[100.0, 0.0], [0.0, 0.0]])) == pytest.approx(math.log(2) / 2)


def test_density_of_clusters_counts_their_members():
    """In clusters of 5 that are alike within and orthogonal between, every example has 4 neighbours."""
    logits = 100 * torch.eye(3).repeat_interleave(5, 0)
    assert soft_neighborhood_density(logits, temperature=0.01) == pytest.approx(math.log(4), abs=1e-6)
    assert soft_neighborhood_density(torch.zeros(9, 3)) == pytest.approx(math.log(8))


def test_density_does_not_depend_on_how_it_is_cut():
    logits = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))
    p = torch.nn.functional.normalize(logits.double().softmax(-1), dim=-1)
    similar = (p @ p.t() / 0.05).fill_diagonal_(-math.inf).softmax(-1)
    expected = torch.special.entr(similar).sum(-1).mean().item()
    assert soft_neighborhood_density(logits) == pytest.approx(expected)


def test_too_little_is_named():
    with pytest.raises(ConfigurationError, match=r"\(1, 2\) and \(5, 2\): expected .* at least 2 examples"):
        proxy_a_distance(torch.zeros(1, 2), torch.zeros(5, 2))
    with pytest.raises(ConfigurationError, match="1 examples, expected at least 2"):
        soft_neighborhood_density(torch.zeros(1, 3))
