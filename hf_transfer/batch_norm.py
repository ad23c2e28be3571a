"""Batch normalisation of batches that hold several domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hf_transfer.cuts import forward_as


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` that normalise by their batch."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def statistics_by_domain(layers: Sequence[nn.Module], domain: Tensor | None) -> Iterator[None]:
    """Let ``layers`` normalise the rows of each domain by that domain's own statistics, as if they came one domain
    after the other: what the model says of a source row then does not depend on the target's, and both domains are
    drawn together by their first two moments at every layer (Li et al. 2016, AdaBN).

    Their running statistics, which evaluation uses, follow all domains in turn. Layers in evaluation mode are left
    alone.

    Args:
        layers: What :func:`batch_norms` gave.
        domain: The number of each row's domain (N,), or None for a batch of one.
    """
    with ExitStack() as stack:
        if layers and domain is not None:
            order = domain.argsort(stable=True)
            sizes = [size for size in domain.bincount().tolist() if size]
            for layer in layers:
                stack.enter_context(forward_as(layer, partial(_apart, layer, layer.forward, order, sizes)))
        yield


def _apart(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], order: Tensor, sizes: list[int], rows: Tensor
) -> Tensor:
    if not layer.training or len(rows) != len(order):
        return forward(rows)
    parts = rows[order.to(rows.device)].split(sizes)
    return torch.cat([forward(part) for part in parts])[order.argsort().to(rows.device)]
