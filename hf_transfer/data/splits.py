"""Seeded choices of rows: a stratified part held out, a class-balanced few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def hold_out(labels: Sequence[Any], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide rows into those kept and a ``share`` held out, each class in proportion (to one row).

    A class too rare for its proportion to reach half a row is kept whole, since what was never trained cannot be
    evaluated.

    Args:
        labels: One class per row; equal values where there are no classes.
        share: Between 0 and 1.
        seed: The same seed always divides the same rows in the same way.

    Returns:
        Indices kept and indices held out, both ascending.
    """
    order, rank, size = _shuffled_ranks(labels, seed)
    count = round(share * len(order))
    by_quantile = order[np.argsort((rank + 0.5) / size, kind="stable")]
    return sorted(by_quantile[count:].tolist()), sorted(by_quantile[:count].tolist())


def draw_few(labels: Sequence[Any], *, count: int, seed: int) -> list[int]:
    """Draw ``count`` rows, as many from each class as there are, ascending.

    For one seed the draws are nested: the 100 are among the 500, so a learning curve grows by adding examples.
    """
    order, rank, _ = _shuffled_ranks(labels, seed)
    return sorted(order[np.argsort(rank, kind="stable")][:count].tolist())


def _shuffled_ranks(labels: Sequence[Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows in random order and, in that order, each row's rank within its class and its class's size."""
    import pandas

    order = np.random.default_rng(seed).permutation(len(labels))
    classes = pandas.Series(pandas.factorize(np.asarray(labels), use_na_sentinel=False)[0][order])
    groups = classes.groupby(classes)
    return order, groups.cumcount().to_numpy(), groups.transform("size").to_numpy()
