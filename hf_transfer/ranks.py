"""Rows from every rank, for terms that couple the examples of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all ranks in the order of ranks, (sum N, ...); alone, ``rows`` themselves.

    Every rank computes the same value of all rows and differentiates it in its own, whose gradient is multiplied by
    the number of ranks, over which DDP averages: together they give the gradient of one process that has all rows.

    Args:
        rows: As many as there are on this rank, which may differ from others.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world = distributed.get_world_size()
        counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world)]
        distributed.all_gather(counts, torch.tensor(len(rows), device=rows.device))
        sizes = [int(count) for count in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(everyone, padded)
        ctx.first = sum(sizes[: distributed.get_rank()])
        ctx.count = len(rows)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return distributed.get_world_size() * gradient[ctx.first : ctx.first + ctx.count]
