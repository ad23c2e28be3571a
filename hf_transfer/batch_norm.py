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
def statistics_by_domain(layers: Sequence[nn.Module], domains: int) -> Iterator[None]:
    """Let ``layers`` normalise the rows of each domain by that domain's own statistics, as if they came one domain
    after the other: what the model says of a source row then does not depend on the target's, and both domains are
    drawn together by their first two moments at every layer (Li et al. 2016, AdaBN).

    Their running statistics, which evaluation uses, follow all domains in turn. Layers in evaluation mode are left
    alone.

    Args:
        layers: What :func:`batch_norms` gave.
        domains: How many take turns in a batch, row by row, as ``DomainCollator`` puts them.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_as(layer, partial(_apart, layer, layer.forward, domains)))
        yield


def _apart(layer: nn.Module, forward: Callable[[Tensor], Tensor], domains: int, rows: Tensor) -> Tensor:
    if not layer.training:
        return forward(rows)
    parts = rows.unflatten(0, (-1, domains)).unbind(1)
    return torch.stack([forward(part.contiguous()) for part in parts], 1).flatten(0, 1)
