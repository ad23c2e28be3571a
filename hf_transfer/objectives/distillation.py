"""Learning what a teacher predicts, in place of or beside the labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import (
    Divergence,
    bernoulli_divergence,
    check_divergence,
    divergence,
    temperature_factor,
)
from hf_transfer.linear_head import LinearHead
from hf_transfer.linear_loss import TeacherHead
from hf_transfer.losses import (
    CLASSIFICATION,
    LossKind,
    label_names,
    loss_kind,
    problem_type,
    shifts_labels,
    transformer_in,
)
from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.teacher import Teacher
from hf_transfer.schedules import Schedule
from hf_transfer.tasks import IGNORED

logger = logging.getLogger(__name__)

SHOWN = 4  # labels named in a message
CHUNK = 1 << 24  # logits compared at a time in evaluation: 64 MiB of float32
ON_POLICY = "on_policy"
"""Stands in batches that the student wrote: there is nothing in them that labels could teach."""


class TeacherPredictions(Objective):
    """What learning from a teacher's predictions has in common, whether the teacher is there or stored.

    Args:
        weight: The paper's alpha.
        temperature: T of both distributions.
    """

    name: ClassVar[str] = "distillation"
    columns: tuple[str, ...] = (ON_POLICY,)

    def __init__(self, *, weight: float | Schedule, temperature: float) -> None:
        super().__init__(weight=weight)
        self.temperature = temperature

    def fuse(self) -> None:
        """Get ready for :meth:`linear_terms`.

        Raises:
            ConfigurationError: The loss cannot be fused with the head.
        """

    def linear_terms(self, batch: Mapping[str, Any], progress: float) -> dict[str, Any]:
        """The arguments of :func:`hf_transfer.linear_loss.linear_distillation_loss` that are the teacher's: a row for
        each position that is scored, in the order of the batch. Needs :meth:`fuse`."""
        raise NotImplementedError(f"{type(self).__name__} must define linear_terms().")

    def _settle(self, student: PreTrainedModel, kind: LossKind | None, problem: str | None, teacher: str) -> None:
        """Refuse a teacher of another ``kind`` or ``problem``, and find out which positions are compared."""
        own = loss_kind(student)
        if own is None or own != kind:
            raise ConfigurationError(
                f"teacher: {teacher} ({kind or 'another task'}) cannot teach {type(student).__name__} "
                f"({own or 'another task'}): expected the same kind of prediction, with a head over classes or tokens."
            )
        problems = problem_type(student.config), problem
        if kind == "classification" and None not in problems and problems[0] != problems[1]:
            raise ConfigurationError(
                f"teacher: its problem_type is '{problem}', the student's '{problems[0]}': expected the same."
            )
        self._shifts = shifts_labels(student)
        self.averaged_over = "examples" if kind == "classification" else "labels"

    def _kept(self, batch: Mapping[str, Any]) -> Tensor:
        """Which positions are scored (B, T), or (B, T - 1) where labels are shifted."""
        labels = batch["labels"][:, 1:] if self._shifts else batch["labels"]
        return labels != IGNORED

    def _rows(self, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
        """Those of ``logits`` that are compared, (N, C): of every example, or of every token that is scored."""
        if self.averaged_over == "examples":
            return logits
        logits = logits[:, -batch["labels"].shape[1] :]  # prompt tuning puts tokens of its own before the text
        return (logits[:, :-1] if self._shifts else logits)[self._kept(batch)]


class Distillation(TeacherPredictions):
    """``T^2 KL(softmax(t / T) || softmax(s / T))``: the student s learns the teacher's t whole distribution (Hinton et
    al. 2015).

    With weight ``alpha`` beside a task's weight of ``1 - alpha`` it is the usual ``alpha T^2 KL + (1 - alpha) CE``;
    ``DistillationTrainer(alpha=...)`` sets both. What is compared follows the head that student and teacher have:

    - one class per example (text, image or audio): the distributions over the classes, mean over the examples,
      those labelled -100 (unlabelled: the task's loss leaves them out) among them;
    - several labels per example: two-way distributions label by label, mean over the labels;
    - a number (``problem_type = "regression"``): ``(s - t)^2``, without temperature;
    - one class per token, or the next token (decoders, encoder-decoders): the distributions at the positions whose
      label is not -100, mean over those of the whole step; what is masked or padded counts for exactly nothing.

    A teacher whose labels are the student's in another order is read in the student's order.

    Args:
        teacher: A transformers model with the same kind of head; it is frozen, stays in evaluation mode, in its own
            precision (quantised too) and on its own device, and is saved nowhere. Objectives that are given the same
            one share its forward pass.
        weight: The paper's alpha.
        temperature: T; Hinton et al. found 2.5 to 4 good for small students. The factor (T^2 for the KL divergences)
            keeps the gradient's size when it changes.
        divergence: ``forward_kl``, ``reverse_kl``, ``jensen_shannon``, ``total_variation`` or ``logit_mse``; see
            :func:`hf_transfer.functional.divergence`.
        beta: The teacher's share in the mixture of ``jensen_shannon``.
        vocabulary: For language models with differently many tokens: how many leading token ids mean the same to both,
            as ``shared_vocabulary(student_tokenizer, teacher_tokenizer)`` finds out.

    Raises:
        ConfigurationError: Unknown divergence, ``temperature`` not positive, ``beta`` outside (0, 1); once the model
            is known, another kind of head, other labels, or another vocabulary.

    Relations:
        ``HiddenStateMatching`` and ``AttentionMatching`` teach what lies below the head;
        ``CrossTokenizerDistillation`` takes a teacher that cuts texts into other tokens; ``StoredDistillation`` reads
        the predictions of a teacher that was run before.

    References:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2. Agarwal et al. 2024 (GKD) for the
        divergences.
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher,
        *,
        weight: float | Schedule = 0.5,
        temperature: float = 2.0,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(weight=weight, temperature=temperature)
        check_divergence(divergence, temperature, beta)
        self.teacher = Teacher.of(teacher)
        self.columns = (ON_POLICY, *sorted(self.teacher.inputs))
        self.divergence = divergence
        self.beta = beta
        self.vocabulary = vocabulary
        self._order: list[int] | None = None
        self._teacher_head: LinearHead | None = None
        self._teacher_tail: tuple[Tensor, Tensor | None] | None = None  # its weights, on the student's device

    def prepare(self, model: nn.Module) -> None:
        student, teacher = transformer_in(model), self.teacher.core
        kind = loss_kind(teacher)
        self._settle(student, kind, problem_type(teacher.config), type(teacher).__name__)
        self.teacher.serve(self, model)
        if kind in CLASSIFICATION:
            self._order = label_order(label_names(student.config), label_names(teacher.config))
        else:
            self.vocabulary = _common_vocabulary(student.config, teacher.config, self.vocabulary)

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> Tensor:
        student, teacher = self._positions(batch, outputs)
        config = transformer_in(model).config
        distance, factor = self._compared(config, student, teacher, kind=self.divergence, temperature=self.temperature)
        return factor * distance.sum() / max(1, len(distance))

    @torch.no_grad()
    def agreement(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any) -> Tensor:
        """How near the student is to its teacher on one batch, for evaluation.

        Returns:
            float32 (B, 3): for each example how many answers are the teacher's (the most probable class, all of
            several labels), the sum of KL(teacher || student) at temperature 1 (of a number: its squared distance),
            and the number of answers.
        """
        config = transformer_in(model).config
        student, teacher = self._positions(batch, outputs)
        answers = []
        size = max(1, CHUNK // max(1, student.shape[-1]))
        for ours, theirs in zip(student.split(size), teacher.split(size), strict=True):
            same = ours.argmax(-1) == theirs.argmax(-1)
            if problem_type(config) == "multi_label_classification":
                same = ((ours > 0) == (theirs > 0)).all(-1)
            distance, _ = self._compared(config, ours, theirs, kind="forward_kl", temperature=1.0)
            answers.append(torch.stack([same.float(), distance.float(), torch.ones_like(same, dtype=torch.float)], 1))
        examples = self._kept(batch).nonzero()[:, 0] if self.averaged_over == "labels" else torch.arange(len(student))
        counts = torch.zeros(len(outputs.logits), 3, device=student.device)
        return counts.index_add_(0, examples.to(counts.device), torch.cat(answers)) if answers else counts

    def fuse(self) -> None:
        self._teacher_head = LinearHead(self.teacher.model)

    def linear_terms(self, batch: Mapping[str, Any], progress: float) -> dict[str, Any]:
        assert self._teacher_head is not None
        with self._teacher_head.skipped():
            hidden = self._rows(batch, self.teacher(batch).logits)
        if self._teacher_tail is None or self._teacher_tail[0].device != hidden.device:
            bias = self._teacher_head.bias
            self._teacher_tail = (
                self._teacher_head.weight[: self.vocabulary].to(hidden.device),
                None if bias is None else bias[: self.vocabulary].to(hidden.device),
            )
        return {
            "teacher": TeacherHead(hidden, *self._teacher_tail),
            "teacher_weight": self.weight_at(progress),
            "temperature": self.temperature,
            "kind": self.divergence,
            "beta": self.beta,
        }

    def _positions(self, batch: Mapping[str, Any], outputs: Any) -> tuple[Tensor, Tensor]:
        """The logits to compare, (N, C) each."""
        answers = outputs.logits, self.teacher(batch).logits.to(outputs.logits.device)
        student, teacher = (self._rows(batch, logits) for logits in answers)
        if self._order is not None:
            return student, teacher[:, self._order]
        return student[:, : self.vocabulary], teacher[:, : self.vocabulary]

    def _compared(
        self, config: PreTrainedConfig, student: Tensor, teacher: Tensor, *, kind: Divergence, temperature: float
    ) -> tuple[Tensor, float]:
        """The distance at each of the N positions, and the factor that makes up for the temperature."""
        problem = problem_type(config) if self.averaged_over == "examples" else None
        if problem == "regression":
            kind = "logit_mse"
        compare = bernoulli_divergence if problem == "multi_label_classification" else divergence
        distance = compare(student, teacher, kind=kind, temperature=temperature, beta=self.beta)
        return distance, temperature_factor(kind, temperature)


def label_order(student: list[str], teacher: list[str]) -> list[int] | None:
    """The teacher's place of each of the student's labels; ``None`` where they stand in the same order.

    Labels are compared by name, in small or capital letters. Names that transformers made up (LABEL_0) say nothing:
    then the numbers must do.

    Raises:
        ConfigurationError: The two have other labels, or not the same number of them.
    """
    ours, theirs = ([name.lower() for name in names] for names in (student, teacher))
    named = not any(names == [f"label_{index}" for index in range(len(names))] for names in (ours, theirs))
    if len(ours) != len(theirs) or (named and sorted(ours) != sorted(theirs)):
        raise ConfigurationError(
            f"teacher: its {len(theirs)} labels are {_listed(theirs, ours)}; expected the student's {len(ours)}: "
            f"{_listed(ours, theirs)}."
        )
    if not named or ours == theirs:
        return None
    logger.warning("The teacher's labels stand in another order: its %s are read as %s.", theirs, ours)
    return [theirs.index(name) for name in ours]


def _listed(names: list[str], others: list[str]) -> str:
    """Those first that the others lack."""
    ordered = sorted(names, key=lambda name: name in others)
    return ", ".join(f"'{name}'" for name in ordered[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _common_vocabulary(student: PreTrainedConfig, teacher: PreTrainedConfig, shared: int | None) -> int:
    ours, theirs = (config.get_text_config().vocab_size for config in (student, teacher))
    if ours != theirs and shared is not None:
        return min(ours, theirs, shared)
    if ours != theirs:
        raise ConfigurationError(
            f"teacher: its vocabulary has {theirs:,} tokens, the student's {ours:,}. Expected the same, or how many "
            "both share: vocabulary=shared_vocabulary(student_tokenizer, teacher_tokenizer)."
        )
    return ours
