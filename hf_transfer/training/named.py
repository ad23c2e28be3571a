"""Trainers named after their method: ``TransferTrainer`` with the method's option set."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_transfer.schedules import GradualUnfreeze, UnfreezeSchedule
from hf_transfer.training.trainer import TransferTrainer


class GradualUnfreezeTrainer(TransferTrainer):
    """``TransferTrainer`` that opens the model from the top, by default one level more each epoch (ULMFiT).

    Combine it with ``layer_decay`` and ``SlantedTriangular`` for the paper's whole recipe. Use ``TopLevels`` with
    ``TransferTrainer`` where the lower blocks should never train.

    Args:
        model: As for ``TransferTrainer``.
        args: As for ``TransferTrainer``.
        unfreeze: When each level opens.
        **options: As for ``TransferTrainer``.

    References:
        Howard & Ruder 2018, Universal Language Model Fine-tuning for Text Classification, section 3.3.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        unfreeze: UnfreezeSchedule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, unfreeze=unfreeze or GradualUnfreeze(), **options)
