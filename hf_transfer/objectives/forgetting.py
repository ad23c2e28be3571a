"""Terms that keep what the model knew before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_transfer.depth import block_names, named_parameters, parameter_depths
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives.base import Objective
from hf_transfer.schedules import Schedule


class L2SP(Objective):
    """Pull the pretrained weights towards where they started: ``1/2 * sum_j (w_j - w0_j)^2`` (Li et al. 2018, eq. 3).

    Weight decay pulls towards zero, hence away from what was learnt; this pulls back. Head parameters have no
    pretrained value and are left out (the paper gives them plain decay, here ``TrainingArguments.weight_decay``).
    The starting point is kept as buffers: one copy of the trainable base, saved with the checkpoints.

    Args:
        weight: The paper's alpha; it searched 1e-1 to 1e-3.

    Raises:
        ConfigurationError: No trainable parameter lies below the head.
    """

    name: ClassVar[str] = "l2sp"
    logits: ClassVar[bool] = False
    averaged_over: Literal["examples", "labels", "steps"] = "steps"

    def __init__(self, *, weight: float | Schedule = 0.01) -> None:
        super().__init__(weight=weight)
        self._buffer_of: dict[str, str] = {}

    def prepare(self, model: nn.Module) -> None:
        head = len(block_names(model)) + 1
        depths = parameter_depths(model)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad and depths[name] < head:
                self._buffer_of[name] = f"start_{index}"
                self.register_buffer(f"start_{index}", parameter.detach().clone())
        if not self._buffer_of:
            raise ConfigurationError("L2SP found no trainable parameter below the head: there is nothing to keep.")

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> torch.Tensor:
        distances = [
            _squared_distance(parameter, getattr(self, self._buffer_of[name]))
            for name, parameter in named_parameters(model).items()
            if name in self._buffer_of and parameter.requires_grad
        ]
        return 0.5 * torch.stack(distances).sum() if distances else next(self.buffers()).new_zeros(())


def _squared_distance(parameter: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Under FSDP2 ``parameter`` is this rank's shard, while ``start`` is whole on every rank."""
    if not isinstance(parameter, DTensor):
        return (parameter - start).square().sum()
    whole = distribute_tensor(start, parameter.device_mesh, parameter.placements, src_data_rank=None)
    distance: DTensor = (parameter - whole).square().sum()  # type: ignore[assignment]
    return distance.full_tensor()
