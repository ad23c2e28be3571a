"""Puts bottleneck adapters into a model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_transfer.adapters.layer import BottleneckLayer, is_linear
from hf_transfer.adapters.placements import block_ends
from hf_transfer.errors import ConfigurationError


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters; made by ``peft.get_peft_model(model, BottleneckConfig(...))``."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, Any] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = block_ends(model_config.get("model_type", ""), peft_config.placement)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        chosen = peft_config.layers_to_transform
        if not found or chosen is None:
            return found
        number = re.search(r"\.(\d+)\.", f".{key}.")
        return number is not None and int(number[1]) in ([chosen] if isinstance(chosen, int) else chosen)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not is_linear(target):
            raise ConfigurationError(
                f"target_modules: '{current_key}' is {type(target).__name__}, expected a linear layer."
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        next(module for module in self.model.modules() if isinstance(module, BottleneckLayer)).merge()
