"""A linear layer with bottleneck adapters behind it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_transfer.adapters.config import BottleneckConfig


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """``base_layer``, full-precision or quantised, and the adapters behind it by name; several active ones follow one
    another in the order they are active in.

    Args:
        base_layer: A linear layer of any kind: what counts is its number of outputs.
        adapter_name: The first adapter's.
        config: What it looks like.
    """

    adapter_layer_names = ("bottleneck_norm", "bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation", "bottleneck_dropout", "bottleneck_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.bottleneck_norm, self.bottleneck_down, self.bottleneck_up = (nn.ModuleDict() for _ in range(3))
        self.bottleneck_activation, self.bottleneck_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_scaling: dict[str, float] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def out_features(self) -> int:
        """Width of the base layer's output."""
        base: Any = self.get_base_layer()
        return base.nf if isinstance(base, Conv1D) else base.out_features

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        features, width = self.out_features, config.width(self.out_features)
        if config.layer_norm:
            self.bottleneck_norm[adapter_name] = nn.LayerNorm(features)
        self.bottleneck_down[adapter_name] = nn.Linear(features, width)
        self.bottleneck_up[adapter_name] = nn.Linear(width, features)
        self.bottleneck_activation[adapter_name] = ACT2FN[config.activation]
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_scaling[adapter_name] = config.scaling
        self._reset(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _reset(self, adapter_name: str, near_identity: bool) -> None:
        """The paper's start: weights of 0.01, within two standard deviations; here the last layer's are zero."""
        for layers in (self.bottleneck_down, self.bottleneck_up):
            layer: Any = layers[adapter_name]
            if layer.weight.is_meta:
                continue
            nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(layer.bias)
            if near_identity and layers is self.bottleneck_up:
                nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                result = result + self._added(name, result).to(result.dtype)
        return result

    def _added(self, name: str, hidden: Tensor) -> Tensor:
        down: Any = self.bottleneck_down[name]
        hidden = self._cast_input_dtype(hidden, down.weight.dtype)
        if name in self.bottleneck_norm:
            hidden = self.bottleneck_norm[name](hidden)
        hidden = self.bottleneck_activation[name](down(self.bottleneck_dropout[name](hidden)))
        return self.bottleneck_scaling[name] * self.bottleneck_up[name](hidden)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what lies behind a layer and bends is no change of its weight.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "A bottleneck adapter cannot be merged: it has an activation between its layers, so that no weight does "
            "the same. Keep it, or take LoRA where a merged model is needed."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can be put behind ``module``."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (torch.nn.Linear, Conv1D))
