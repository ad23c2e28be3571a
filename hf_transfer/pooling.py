"""One vector per example out of a forward pass: what the head reads, or any module's hidden states, pooled."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.losses import loss_kind, transformer_in

Positions = Literal["cls", "mean", "last"]
HEAD = "head"


def real_tokens(model: nn.Module, batch: Mapping[str, Any], width: int) -> Tensor:
    """Where the hidden states of ``batch`` are real tokens': (B, ``width``), False at padding.

    Without an attention mask all of an example are. Audio models hear many samples and have one hidden state for all.
    """
    core: Any = transformer_in(model)
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(len(next(iter(batch.values()))), width, dtype=torch.bool, device=core.device)
    base = core.base_model
    if hasattr(base, "_get_feat_extract_output_lengths"):
        frames = int(base._get_feat_extract_output_lengths(mask.shape[1]))
        mask = base._get_feature_vector_attention_mask(frames, mask)
    return mask.bool()


def pool(hidden: Tensor, real: Tensor, positions: Positions) -> Tensor:
    """Hidden states (B, T, D) at the first or last real token, or their mean over all real tokens: (B, D).

    Of an example without a real token the mean is 0, and the first and last are what stands at position 0.

    Args:
        hidden: (B, T, D).
        real: (B, T), False at padding, wherever that is.
        positions: "cls", "mean" or "last".
    """
    if positions == "mean":
        total = hidden.float().masked_fill(~real.unsqueeze(-1), 0).sum(1)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    order = torch.arange(real.shape[1], device=real.device)
    places = (real * (order.flip(0) + 1 if positions == "cls" else order)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


class PooledFeatures:
    """Keeps what a model's forward pass leaves at one place, until it is taken as one vector per example.

    No second forward pass and no ``output_hidden_states``: a hook keeps a reference, as long as this object lives. It
    sees through PEFT, DDP and a head that the fused loss leaves out.

    Args:
        model: A transformers model, bare or inside a PEFT model.
        pooling: "head" is the input of the last linear layer, which is what decides; of a classifier that scores every
            token (a decoder) that of the last real one, of a language or token model the mean over real tokens.
            "cls", "mean" and "last" are of the base's last hidden states. Anything else is a module's name, whose
            output is averaged over real tokens or, of an image (B, C, H, W), over places.

    Raises:
        ConfigurationError: The model has no such module or no linear head, or is an encoder and a decoder.
    """

    def __init__(self, model: nn.Module, pooling: str = HEAD) -> None:
        self._core: Any = transformer_in(model)
        self._pooling = pooling
        self._kept: Any = None
        self.listens = True
        """Whether the next forward pass is kept."""
        if self._core.config.is_encoder_decoder:
            raise ConfigurationError(
                f"{type(self._core).__name__} is an encoder and a decoder: no features are pooled."
            )
        if pooling == HEAD:
            modules: list[nn.Module] = [*self._heads()]  # the last one called has the last word
        else:
            modules = [self._module(model)]
        for module in modules:
            handle = module.register_forward_hook(partial(_keep, weakref.ref(self), pooling == HEAD))
            weakref.finalize(self, handle.remove)

    @property
    def size(self) -> int:
        """D, as far as the model says it before a forward pass.

        Raises:
            ConfigurationError: It does not say.
        """
        if self._pooling == HEAD:
            return self._heads()[-1].in_features
        module, config = self._module(self._core), self._core.config.get_text_config()
        sizes = [getattr(module, "out_features", None), getattr(config, "hidden_size", None)]
        sizes += list(getattr(config, "hidden_sizes", None) or [])[-1:]
        found = next((size for size in sizes if isinstance(size, int)), None)
        if found is None:
            raise ConfigurationError(
                f"pooling = '{self._pooling}': {type(self._core).__name__} does not say how wide that is. Take head."
            )
        return found

    def take(self, batch: Mapping[str, Any]) -> Tensor:
        """The features (B, D) of the last forward pass, which was that of ``batch``; they are kept no longer.

        Raises:
            ConfigurationError: The place was not reached, or has no example per row.
        """
        found, self._kept = self._kept, None
        if isinstance(found, (tuple, ModelOutput)):
            found = found[0]
        if not isinstance(found, Tensor) or len(found) != len(next(iter(batch.values()))):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigurationError(f"pooling = '{self._pooling}': expected one row per example, found {shape}.")
        if found.dim() == 4:
            return found.mean((2, 3))
        if found.dim() == 3:
            real = real_tokens(self._core, batch, found.shape[1]).to(found.device)
            if real.shape != found.shape[:2]:
                raise ConfigurationError(
                    f"pooling = '{self._pooling}': hidden states of {found.shape[1]} tokens where the batch has "
                    f"{real.shape[1]}: virtual tokens (prompt tuning) cannot be told from real ones."
                )
            return pool(found, real, self._positions)
        return found

    def _heads(self) -> list[nn.Linear]:
        base = self._core.base_model
        inside = set() if base is self._core else set(base.modules())
        for layer in self._core.modules():
            if isinstance(layer, BaseTunerLayer) and isinstance(layer, nn.Module):
                factors = (part for name, part in layer.named_children() if name != "base_layer")
                inside |= {each for part in factors for each in part.modules()}  # LoRA's own, on the head
        heads = [each for each in self._core.modules() if isinstance(each, nn.Linear) and each not in inside]
        if not heads:
            raise ConfigurationError(
                f"pooling = 'head': {type(self._core).__name__} has no linear head. Take cls, mean, last, or the name "
                "of a module."
            )
        return heads

    def _module(self, model: nn.Module) -> nn.Module:
        if self._pooling in get_args(Positions):
            return self._core.base_model
        names = dict(model.named_modules()) | dict(self._core.named_modules())
        if self._pooling not in names:
            valid = [HEAD, *get_args(Positions), *names]
            raise ConfigurationError(
                f"pooling = '{self._pooling}': {type(self._core).__name__} has no such module. "
                f"{nearest(self._pooling, valid)}"
            )
        return names[self._pooling]

    @property
    def _positions(self) -> Positions:
        for positions in get_args(Positions):
            if self._pooling == positions:
                return positions
        return "last" if self._pooling == HEAD and loss_kind(self._core) == "classification" else "mean"


def _keep(
    features: weakref.ref[PooledFeatures], reads_input: bool, _: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    place = features()
    if place is not None and place.listens:
        place._kept = args[0] if reads_input else output
