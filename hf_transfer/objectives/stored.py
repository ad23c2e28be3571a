"""Learning what a teacher predicted, from what is stored of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_transfer.batches import EXAMPLE_INDEX
from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import sampled_divergence, temperature_factor, top_k_divergence
from hf_transfer.losses import label_names, transformer_in
from hf_transfer.objectives.distillation import TeacherPredictions, label_order
from hf_transfer.schedules import Schedule
from hf_transfer.targets import Samples, TopK
from hf_transfer.teacher_store import TeacherStore


class StoredDistillation(TeacherPredictions):
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` as :class:`Distillation` has it, the teacher's t read from disk.

    The training data must be those that the store was built from; every example brings its number in the column
    ``example_index``, which the trainer adds. With the most probable tokens and their tail, the divergence is a lower
    bound of the full one that reaches it as k grows; with samples it is an unbiased estimate.

    Args:
        store: What ``TeacherStore.build`` or ``open`` gave.
        weight: The paper's alpha.
        temperature: T; samples serve the one they were drawn at.

    Raises:
        ConfigurationError: ``temperature`` is not one that the store serves; once the model is known, another kind of
            head, other labels or fewer tokens than the store's; in training, a batch whose labels the store does not
            know.

    Example:
        >>> store = TeacherStore.open("out/teacher", train_dataset, collator)
        >>> trainer = DistillationTrainer(student, args, teacher=store, train_dataset=train_dataset)
    """

    columns: tuple[str, ...] = (EXAMPLE_INDEX,)

    def __init__(self, store: TeacherStore, *, weight: float | Schedule = 0.5, temperature: float = 2.0) -> None:
        super().__init__(weight=weight, temperature=temperature)
        store.rows(torch.tensor([0])).at_temperature(temperature)  # refuses a temperature it does not serve
        self.store = store
        self._place: Tensor | None = None

    def prepare(self, model: nn.Module) -> None:
        student = transformer_in(model)
        single = "single_label_classification" if self.store.kind == "classification" else None
        self._settle(student, self.store.kind, single, "the store's teacher")
        if self.store.label_names is not None:
            order = label_order(label_names(student.config), self.store.label_names)
            self._place = None if order is None else torch.tensor(order).argsort()
        elif (tokens := student.config.get_text_config().vocab_size) < self.store.vocabulary:
            raise ConfigurationError(
                f"teacher: the store is of distributions over {self.store.vocabulary:,} tokens, the student has "
                f"{tokens:,}. Expected no more: build it with vocabulary={tokens} where the others only pad the "
                "teacher's vocabulary."
            )

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> Tensor:
        student = self._rows(batch, outputs.logits)
        target = self._target(batch, len(student))
        if isinstance(target, TopK):
            distance = top_k_divergence(student, *target, temperature=self.temperature)
        else:
            distance = sampled_divergence(student, *target, temperature=self.temperature)
        return temperature_factor("forward_kl", self.temperature) * distance.sum() / max(1, len(distance))

    def linear_terms(self, batch: Mapping[str, Any], progress: float) -> dict[str, Any]:
        return {
            "teacher": self._target(batch, int(self._kept(batch).sum())),
            "teacher_weight": self.weight_at(progress),
            "temperature": self.temperature,
        }

    def _target(self, batch: Mapping[str, Any], expected: int) -> TopK | Samples:
        target = self.store.rows(batch[EXAMPLE_INDEX]).at_temperature(self.temperature)
        if len(target.ids) != expected:
            raise ConfigurationError(
                f"teacher: the store has {len(target.ids)} rows of a batch where {expected} are learnt from: its "
                "labels are not those that the store was built with."
            )
        return target if self._place is None else target._replace(ids=self._place.to(target.ids.device)[target.ids])
