"""The last linear layer of a language model, left out of its forward so that the logits are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_transfer.cuts import evaluating, forward_as, unchanged
from hf_transfer.errors import ConfigurationError
from hf_transfer.linear_loss import LinearLoss
from hf_transfer.losses import loss_kind, transformer_in
from hf_transfer.tasks import IGNORED

HeadLoss = Callable[[Tensor, Tensor, Tensor | int | None], LinearLoss]
"""Takes hidden states (N, D), labels (N,) shifted to match them, and the number of labels of the whole step."""


class LinearHead:
    """A language model's head and loss, as two things that its forward can do without.

    While the head is :meth:`skipped`, the model's ``logits`` are the hidden states that the head would have read.
    Under :meth:`computing`, the given function takes the place of the model's loss as well, inside its forward: there
    DDP and FSDP have all weights in place.

    Whether a model allows this is found by trial: its ``logits`` must be exactly what stands in for the head's answer,
    and its ``loss`` exactly what stands in for its loss function's (Gemma 2 caps its logits, Cohere scales them, T5
    computes its loss itself).

    Args:
        model: A causal language model, with or without a PEFT adapter.

    Raises:
        ConfigurationError: It is none, its head is no plain linear layer (quantised, or with an adapter), or something
            is done to the logits between head and loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self._core: Any = transformer_in(model)
        kind = type(self._core).__name__
        layer = self._core.get_output_embeddings()
        if loss_kind(model) != "causal language model" or type(layer) is not nn.Linear or layer.weight.is_meta:
            raise ConfigurationError(f"{kind} has no plain linear head over a vocabulary ({type(layer).__name__}).")
        self._layer = layer
        if not self._can_be_left_out():
            raise ConfigurationError(f"{kind} does more to its logits than its linear head and its loss function say.")

    @property
    def weight(self) -> Tensor:
        """(V, D)."""
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,)."""
        return self._layer.bias

    def skipped(self) -> AbstractContextManager[None]:
        """Let the model answer with the head's input (B, T, D) in place of logits."""
        return forward_as(self._layer, unchanged)

    @contextmanager
    def computing(self, loss: HeadLoss) -> Iterator[list[LinearLoss]]:
        """Let ``loss`` be the model's loss; the list gets what it returned."""
        results: list[LinearLoss] = []

        def loss_function(
            logits: Tensor,
            labels: Tensor,
            vocab_size: int | None = None,
            num_items_in_batch: Tensor | int | None = None,
            shift_labels: Tensor | None = None,
            **_: Any,
        ) -> Tensor:
            if shift_labels is None:
                shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
            results.append(loss(logits.flatten(0, -2), shift_labels.flatten(), num_items_in_batch))
            return results[-1].loss

        with self.skipped(), self._loss_as(loss_function):
            yield results

    def _can_be_left_out(self) -> bool:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._layer.weight.device)
        answer = torch.linspace(-1e4, 1e4, 2 * self._layer.in_features, device=tokens.device).view(1, 2, -1)
        answer = answer.to(self._layer.weight.dtype)
        seen = []

        def loss_function(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append((logits, labels))
            return answer.sum()

        with evaluating(self._core), forward_as(self._layer, lambda _: answer), self._loss_as(loss_function):
            outputs = self._core(input_ids=tokens, labels=tokens)
        return bool(
            seen
            and torch.equal(seen[0][0], answer)
            and torch.equal(outputs.logits, answer)
            and torch.equal(seen[0][1], tokens)
            and torch.equal(outputs.loss, answer.sum())
        )

    @contextmanager
    def _loss_as(self, function: Callable[..., Tensor]) -> Iterator[None]:
        own = vars(self._core).get("_loss_function")
        self._core.loss_function = function
        try:
            yield
        finally:
            if own is None:
                del self._core._loss_function
            else:
                self._core.loss_function = own
