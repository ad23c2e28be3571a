"""What an evaluation can tell of a target without its labels, and the checkpoint that each way of choosing takes."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.scores import (
    deep_embedded_risk,
    density_ratios,
    importance_weighted_risk,
    mean_entropy,
    proxy_a_distance,
    soft_neighborhood_density,
    target_probability,
)
from hf_transfer.tasks import IGNORED

logger = logging.getLogger(__name__)

SCORED = 1000  # examples of a domain in an evaluation
FEWEST = 2  # examples of a domain that a classifier can be fitted without one half of

CRITERIA = {
    "deep_embedded_risk": False,
    "importance_weighted_risk": False,
    "target_entropy": False,
    "soft_neighborhood_density": True,
    "proxy_a_distance": False,
}
"""What can choose a checkpoint without target labels, and whether more of it is better."""


@dataclass
class Answers:
    """What a model says of a data set, batch by batch."""

    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def of(self, what: str) -> Tensor | None:
        """All of "features", "logits" or "labels", at most :data:`SCORED` examples, evenly taken."""
        parts = getattr(self, what)
        if not parts:
            return None
        rows = torch.cat(parts)
        return rows[:: math.ceil(len(rows) / SCORED)]

    def add(self, features: Tensor, logits: Tensor | None, labels: Tensor | None) -> None:
        for parts, part in ((self.features, features), (self.logits, logits), (self.labels, labels)):
            if part is not None:
                parts.append(part.detach().float().cpu() if part.is_floating_point() else part.cpu())


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def label_free_scores(source: Answers, target: Answers) -> dict[str, float]:
    """The scores of :data:`CRITERIA`; of a model that does not choose one class per example, the distance alone; of
    fewer than two examples, or where features are no finite numbers, none.

    Args:
        source: Of labelled source examples that were not trained on.
        target: Of target examples.
    """
    ours, theirs = source.of("features"), target.of("features")
    if ours is None or theirs is None or min(len(ours), len(theirs)) < FEWEST or not _finite(ours, theirs):
        logger.warning("No scores of the target: too few examples, or features that are no finite numbers.")
        return {}
    probability = target_probability(ours, theirs)
    scores = {"proxy_a_distance": proxy_a_distance(ours, theirs, probability=probability)}
    labels, logits, guesses = source.of("labels"), source.of("logits"), target.of("logits")
    if labels is None or labels.is_floating_point() or logits is None or guesses is None:
        return scores
    known = labels != IGNORED
    losses = functional.cross_entropy(logits[known], labels[known], reduction="none")
    ratios = density_ratios(ours, theirs, probability=probability)[known]
    return {
        **scores,
        "importance_weighted_risk": importance_weighted_risk(losses, ratios),
        "deep_embedded_risk": deep_embedded_risk(losses, ratios),
        "target_entropy": mean_entropy(guesses),
        "soft_neighborhood_density": soft_neighborhood_density(guesses),
    }


def selections(
    log_history: Iterable[Mapping[str, Any]],
    *,
    metric: str,
    greater_is_better: bool,
    criterion: str = "deep_embedded_risk",
) -> dict[str, dict[str, float]]:
    """Which evaluation each way of choosing takes, and the scores there.

    ``source`` takes the best on source validation data, ``honest`` the best by a criterion without target labels, and
    ``oracle`` the best on labelled target data, which nobody has who needs to adapt: it is there only if such data
    were evaluated on, and for comparison.

    Args:
        log_history: The Trainer's ``state.log_history``.
        metric: The task's own, as evaluation names it without prefix ("accuracy").
        greater_is_better: Whether more of it is better.
        criterion: One of :data:`CRITERIA`.

    Returns:
        By way of choosing: the step, the source's metric and, where it is known, the target's.

    Raises:
        ConfigurationError: ``criterion`` is none of them, or no evaluation has what a choice needs.
    """
    if criterion not in CRITERIA:
        raise ConfigurationError(f"criterion = {criterion!r}. {nearest(criterion, CRITERIA)}")
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for entry in log_history:
        step = entry["step"]  # the oracle's scores are an entry of their own; the first is that of the checkpoint
        by_step[step] = {**entry, **by_step[step]}
    entries = [entry for entry in by_step.values() if f"eval_{criterion}" in entry and f"eval_{metric}" in entry]
    if not entries:
        raise ConfigurationError(f"No evaluation has 'eval_{criterion}' and 'eval_{metric}': nothing to choose from.")
    ways = {"source": (f"eval_{metric}", greater_is_better), "honest": (f"eval_{criterion}", CRITERIA[criterion])}
    if all(f"eval_oracle_{metric}" in entry for entry in entries):
        ways["oracle"] = (f"eval_oracle_{metric}", greater_is_better)
    chosen = {}
    for way, (key, greater) in ways.items():
        entry = (max if greater else min)(entries, key=lambda entry: entry[key])
        chosen[way] = {"step": entry["step"], f"source_{metric}": entry[f"eval_{metric}"]}
        if f"eval_oracle_{metric}" in entry:
            chosen[way][f"target_{metric}"] = entry[f"eval_oracle_{metric}"]
    return chosen
