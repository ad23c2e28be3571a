"""Distillation from a teacher whose tokenizer is not the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from hf_transfer.data.teacher_tokens import TEACHER_COLUMNS, TEACHER_MASK
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives.base import Objective
from hf_transfer.schedules import Schedule
from hf_transfer.tasks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SORTED_AT_ONCE = 1 << 24  # probabilities; a few times 64 MB while they are compared


class CrossTokenizerDistillation(Objective):
    """Teach a language model with one of another tokenizer: compare them wherever both have read the same text.

    Per example the mean of `universal_logit_distance` over its aligned positions (`aligned_positions`) whose next
    token has a label; then the mean over the batch's examples, an example without such a position counting as 0.

    Why this form: ULD (Boizard et al. 2024) pairs the models' tokens by their number, so that after the first word
    that is cut differently it compares predictions about different places. GOLD (TRL, 2025) aligns spans of text and
    scales one distribution of a span by the probability of its other tokens, which leaves nothing that sums to 1. Here
    both distributions are whole, and both are conditioned on exactly the same characters; positions inside a span have
    no counterpart and are not compared.

    The distance does not know *which* token is likely: it needs the task's loss beside it, as in the paper, or
    ``span_weight``. That adds per span between neighbouring aligned positions (mean taken likewise) how well the
    student knows the teacher's probability ``q`` of what was written, with ``p`` its own: the binary divergence
    ``q log(q / p) + (1 - q) log((1 - q) / (1 - p))`` (approximate likelihood matching: Minixhofer et al. 2025).

    Needs rows from `add_teacher_tokens` and a `TeacherCollator`. Where both speak of the same tokens
    (`shared_vocabulary`), distil id by id instead, which says more.

    Args:
        teacher: A causal language model, put into evaluation mode and frozen. It stays on its device, quantised or
            not, and is neither trained, saved nor moved with the objective.
        weight: The paper's lambda; the distance is at most 2.
        temperature: Of both distributions (not of ``span_weight``'s term); the distance is not rescaled by it.
        span_weight: Factor of the spans' divergence within the term, in nats; 0 is the paper's objective.

    Raises:
        ConfigurationError: The teacher generates no text, ``temperature`` is not positive, ``span_weight`` is
            negative; in training, the batch lacks the teacher's columns or the student gives no logits by token.

    Example:
        >>> rows = add_teacher_tokens(texts, student_tokenizer, teacher_tokenizer, max_length=512)
        >>> trainer = TransferTrainer(
        ...     student, args, train_dataset=rows, objectives=[CrossTokenizerDistillation(teacher)],
        ...     data_collator=TeacherCollator(DataCollatorForTokenClassification(student_tokenizer)),
        ... )
    """

    name: ClassVar[str] = "cross_tokenizer_distillation"
    columns: tuple[str, ...] = (*TEACHER_COLUMNS, TEACHER_MASK)

    teacher: PreTrainedModel

    def __init__(
        self,
        teacher: PreTrainedModel,
        *,
        weight: float | Schedule = 1.0,
        temperature: float = 1.0,
        span_weight: float = 0.0,
    ) -> None:
        super().__init__(weight=weight)
        if not teacher.can_generate() or teacher.config.is_encoder_decoder:
            raise ConfigurationError(
                f"CrossTokenizerDistillation: expected a causal language model as teacher, found "
                f"{type(teacher).__name__}. Load it with AutoModelForCausalLM."
            )
        if temperature <= 0:
            raise ConfigurationError(
                f"CrossTokenizerDistillation: 'temperature' must be positive, found {temperature}."
            )
        if span_weight < 0:
            raise ConfigurationError(
                f"CrossTokenizerDistillation: 'span_weight' must be 0 or more, found {span_weight}."
            )
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))  # not a submodule
        self.temperature = temperature
        self.span_weight = span_weight

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> torch.Tensor:
        missing = [column for column in self.columns if column not in batch]
        if missing:
            raise ConfigurationError(
                f"CrossTokenizerDistillation: the batch has no '{missing[0]}'. Make the rows with add_teacher_tokens "
                "and collate them with TeacherCollator."
            )
        labels = batch["labels"]
        if outputs.logits.dim() != 3:
            raise ConfigurationError(
                f"CrossTokenizerDistillation: expected logits (examples, tokens, vocabulary) of the student, found "
                f"{tuple(outputs.logits.shape)}. Load it with AutoModelForCausalLM."
            )
        logits = outputs.logits[:, -labels.shape[1] :]  # a learnt prompt comes before
        positions, others = batch["aligned_student"], batch["aligned_teacher"]
        compared = (positions >= 0) & labels.gather(1, positions + 1).ne(IGNORED)
        rows, which = compared.nonzero(as_tuple=True)
        teacher_logits = self._teacher_logits(batch)
        there = teacher_logits.device
        distance = universal_logit_distance(
            logits[rows, positions[rows, which]],
            teacher_logits[rows.to(there), others[rows, which].to(there)].to(logits.device),
            temperature=self.temperature,
        )
        term = _mean_over_examples(distance, compared)
        if self.span_weight:
            unlabelled = labels.eq(IGNORED).cumsum(1).gather(1, positions.clamp(min=0))
            spans = (positions[:, 1:] >= 0) & (unlabelled[:, 1:] == unlabelled[:, :-1])
            ours = span_log_probabilities(logits, batch["input_ids"], positions)
            theirs = span_log_probabilities(teacher_logits, batch["teacher_input_ids"].to(there), others.to(there)).to(
                logits.device
            )
            divergence = _binary_divergence(ours[spans], theirs[spans])
            term = term + self.span_weight * _mean_over_examples(divergence, spans)
        return term

    @torch.no_grad()
    def _teacher_logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        device = self.teacher.device
        return self.teacher(
            input_ids=batch["teacher_input_ids"].to(device),
            attention_mask=batch[TEACHER_MASK].to(device),
            use_cache=False,
        ).logits


def universal_logit_distance(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """``sum_i |p_(i) - q_(i)|`` over ranks: ``p`` the student's, ``q`` the teacher's probabilities in falling order.

    The smaller vocabulary is filled up with zeros (ULD: Boizard et al. 2024, eq. 3). It is 0 for the same distribution
    over other tokens and below 2 always: it compares how sure the models are, and of how many choices, not of which.

    Rows are sorted in full: over 128,256 tokens that is about a quarter of the time of the head that made the logits
    (hidden size 2048, one core), and the leading ranks alone would miss most of what an untrained student spreads out.
    It is done some rows at a time in float32 (float64 stays), and the gradient is computed on the way, so that one
    matrix of the logits' size and type is kept for the backward pass instead of probabilities, ranks and differences.

    Args:
        student_logits: (N, V_student).
        teacher_logits: (N, V_teacher); no gradient flows there.
        temperature: Both logits are divided by it.

    Returns:
        (N,), in float32 or wider.
    """
    return _SortedDistance.apply(student_logits, teacher_logits, temperature)


def span_log_probabilities(logits: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``sum_t log p(token_t | tokens_<t)`` over the tokens between neighbouring ``positions``: of a span of text, cut
    by one tokenizer or the other, the probability that each model gives it.

    Args:
        logits: (B, T, V); those at t predict token t + 1.
        input_ids: (B, T).
        positions: (B, A), increasing in each row and then filled up with -1. Span k holds the tokens
            ``positions[k] + 1`` to ``positions[k + 1]``.

    Returns:
        (B, A - 1); 0 where there is no span.
    """
    rows, length = input_ids.shape
    each = -cross_entropy(_precise(logits[:, :-1].flatten(0, 1)), input_ids[:, 1:].flatten(), reduction="none")
    bounds = positions.masked_fill(positions < 0, length)
    tokens = torch.arange(1, length, device=positions.device).expand(rows, -1)
    span = torch.searchsorted(bounds, tokens.contiguous())  # 0: before the first position; A: after the last
    sums = each.new_zeros(rows, positions.shape[1] + 1).scatter_add(1, span, each.view(rows, -1))
    return sums[:, 1:-1].masked_fill(positions[:, 1:] < 0, 0.0)


class _SortedDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        distance = _precise(student.new_empty(len(student)))
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        shared = min(student.shape[1], teacher.shape[1])
        rows = max(1, _SORTED_AT_ONCE // max(student.shape[1], teacher.shape[1]))
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            ours, order = _sorted_probabilities(student[chunk], temperature)
            theirs, _ = _sorted_probabilities(teacher[chunk], temperature)
            difference = ours.clone()
            difference[:, :shared] -= theirs[:, :shared]
            distance[chunk] = difference.abs().sum(1) + theirs[:, shared:].sum(1)
            if gradient is not None:
                slope = difference.sign_()
                slope -= (ours * slope).sum(1, keepdim=True)
                gradient[chunk].scatter_(1, order, (ours * slope / temperature).to(student.dtype))
        ctx.save_for_backward(gradient)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None


def _sorted_probabilities(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (_precise(logits) / temperature).softmax(dim=1).sort(dim=1, descending=True)


def _precise(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _binary_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of events with these log-probabilities from the teacher's side; nearly certain ones count as certain to 1e-6."""
    p, q = student.clamp(max=-1e-6), teacher.clamp(max=-1e-6)
    p_not, q_not = (torch.log(-torch.expm1(value)) for value in (p, q))
    return q.exp() * (q - p) + q_not.exp() * (q_not - p_not)


def _mean_over_examples(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the mean over each row's ``values``, which stand for the true elements of ``mask`` (B, A)."""
    rows = mask.nonzero()[:, 0]
    sums = values.new_zeros(len(mask)).index_add(0, rows, values)
    return (sums / mask.sum(1).clamp(min=1)).mean()
