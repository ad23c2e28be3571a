"""What a bottleneck adapter looks like and where it is put."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from peft import PeftConfig
from transformers.activations import ACT2FN

from hf_transfer.adapters.placements import Placement
from hf_transfer.adapters.types import peft_type
from hf_transfer.errors import ConfigurationError, nearest

METHOD = "bottleneck"


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters: behind a sub-layer's last linear layer, before its residual is added, its output h becomes
    ``h + scaling * up(activation(down(dropout(norm(h)))))``.

    The up-projection starts at zero, so that an adapted model starts as the base, bit for bit.

    Args:
        placement: ``"houlsby"`` puts one behind the attention and one behind the feed-forward half of every block
            (Houlsby et al. 2019); ``"pfeiffer"`` one behind the feed-forward half (Pfeiffer et al. 2021), which is
            half the parameters at nearly the same scores.
        reduction_factor: Width of the layer adapted over that of the bottleneck; 16 is what both papers found enough.
        bottleneck_size: The bottleneck's width itself, instead.
        activation: A name in ``transformers.activations.ACT2FN``.
        scaling: Factor of what is added.
        dropout: Of the adapter's input.
        layer_norm: Whether the adapter's input is normalised.
        target_modules: Names of linear layers (as ends of their full names, or one regular expression), where the
            architecture is not known or others are meant; ``placement`` is then not read.
        exclude_modules: Of these, which to leave out.
        layers_to_transform: Numbers of the blocks that get adapters; by default all.
        modules_to_save: Further modules to train and save, such as a new head.
        init_weights: If false, the up-projection is random too.

    Raises:
        ConfigurationError: A size, rate or name that cannot be.

    References:
        Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, section 2.1. Pfeiffer et al. 2021,
        AdapterFusion.
    """

    placement: Placement = "houlsby"
    reduction_factor: float = 16.0
    bottleneck_size: int | None = None
    activation: str = "gelu"
    scaling: float = 1.0
    dropout: float = 0.0
    layer_norm: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(METHOD)
        if self.placement not in get_args(Placement):
            raise ConfigurationError(f"placement = {self.placement!r}. {nearest(self.placement, get_args(Placement))}")
        if self.activation not in ACT2FN:
            raise ConfigurationError(f"activation = {self.activation!r}. {nearest(self.activation, ACT2FN)}")
        if not self.reduction_factor > 0:
            raise ConfigurationError(f"reduction_factor = {self.reduction_factor}: expected more than 0, such as 16.")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ConfigurationError(f"bottleneck_size = {self.bottleneck_size}: expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"dropout = {self.dropout}: expected a share from 0 to below 1.")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))

    def width(self, features: int) -> int:
        """Of the bottleneck behind a layer of so many outputs."""
        return self.bottleneck_size or max(round(features / self.reduction_factor), 1)
