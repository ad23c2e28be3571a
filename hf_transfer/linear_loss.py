"""A language model's head and its loss in one: cross-entropy and a divergence from a teacher, without the logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import Divergence, check_divergence
from hf_transfer.linear_blocks import BlockValues, Terms, autograd_block, cross_entropy_block, forward_kl_block
from hf_transfer.targets import Samples, TopK
from hf_transfer.tasks import IGNORED

logger = logging.getLogger(__name__)

_CACHED = 2**18  # numbers of a block; four blocks of float32 in 4 MiB
_GPU_BLOCK = 2**25  # the same elsewhere: 128 MiB of float32
_HELD = {"cpu": 2**24, "other": 2**28}  # logits of a chunk: 64 MiB of float32, 512 MiB of bfloat16
_MOST_ROWS = 4096  # of a chunk


class TeacherHead(NamedTuple):
    """A teacher known by what its head reads and the head itself; nothing here is differentiated.

    Args:
        hidden: The teacher's last hidden states (N, Dt), row by row those of the student's.
        weight: (Vt, Dt); its first tokens must be the student's.
        bias: (Vt,).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class LinearLoss(NamedTuple):
    """What :func:`linear_distillation_loss` returns: three scalars, all divided by the same ``normalizer``.

    Args:
        loss: The weighted sum; the only one that can be differentiated.
        cross_entropy: Unweighted, in nats.
        divergence: Unweighted, with the temperature's factor in it.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TeacherHead | TopK | Samples | None = None,
    *,
    bias: Tensor | None = None,
    task_weight: float = 1.0,
    teacher_weight: float = 1.0,
    temperature: float = 2.0,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
) -> LinearLoss:
    """Cross-entropy and divergence of ``hidden @ weight.T + bias``, whose N x V logits are never held.

    ``loss = (task_weight * sum CE + teacher_weight * factor * sum divergence) / normalizer`` over the rows whose label
    is not -100, where the factor is :func:`~hf_transfer.functional.temperature_factor`; the rows labelled -100 cost
    nothing and get a gradient of exactly zero. Without a teacher it is the fused cross-entropy alone.

    One forward makes values and gradients, ``chunk_size`` rows at a time: the chunk's logits turn into their own
    gradient in place, a few rows at a time so that they stay in the processor's cache, and both are multiplied on
    into the gradients of ``hidden`` and ``weight``. Nothing is computed again in the backward pass (the way of
    Liger's chunked losses, Hsu et al. 2024), which therefore runs once: ``retain_graph`` does not bring it back, and
    there is no second derivative. What does not require grad costs nothing; under ``no_grad`` only values are made.

    Precision: the products run in the weights' type (under autocast in its type; float16 is raised to float32, whose
    range the unnormalised gradients need), softmax and sums in float32, or in float64 where the weights are. With
    bfloat16 a chunk's share of the weight's gradient is rounded to bfloat16 once (not on a GPU), and the shares add up
    in float32.

    ``forward_kl`` is the fast one (at T = 1 and 2 a single exponential serves both terms); the other kinds, and a
    teacher with fewer tokens than the student, differentiate each block of rows with autograd. On a CUDA GPU the
    cross-entropy alone and ``forward_kl`` from a head run as one Triton kernel between the products; what else there
    is runs there as it does on a CPU, which is logged once.

    Args:
        hidden: (N, D), each row what the head predicts ``labels`` at the same row from: shifted by the caller.
        weight: (V, D).
        labels: (N,), -100 where there is nothing to predict.
        teacher: ``TeacherHead``; or what was stored of it at ``temperature``, one row per row of ``hidden``. The
            divergence from a head is over the first min(V, Vt) tokens and both are renormalised there.
        bias: (V,).
        task_weight: Factor of the cross-entropy.
        teacher_weight: Factor of the divergence.
        temperature: T of the divergence (Hinton et al. 2015 found 2.5 to 4 good for small students, 2 is the usual
            start); the cross-entropy is always at T = 1.
        kind: The divergence; only ``forward_kl`` for a stored teacher.
        beta: See :func:`~hf_transfer.functional.divergence`.
        normalizer: What the sums are divided by: by default the number of labels that are not -100 (at least 1);
            ``num_items_in_batch`` where a step has several micro-batches.
        chunk_size: Rows whose logits are held at once; by default at most 4,096 and as many as make 64 MiB in float32,
            for a student and as much for a teacher's head: 128 rows of 128,256 tokens, 512 of 32,000. On a GPU 16
            times as many. Matrix products of fewer rows are slower, of more hardly faster.

    Raises:
        ConfigurationError: Shapes that do not fit, a token outside the vocabulary, a divergence that cannot be
            computed (see :func:`~hf_transfer.functional.divergence`) or not from this teacher.
    """
    check_divergence(kind, temperature, beta)
    _check(hidden, weight, bias, labels, teacher, kind, chunk_size)
    rows = (labels != IGNORED).nonzero().squeeze(1)
    wanted = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias)]
    terms = Terms(
        task_weight=task_weight,
        teacher_weight=teacher_weight,
        temperature=temperature,
        kind=kind,
        beta=beta,
        differentiate=any(wanted),
    )
    job = _Job(
        rows=rows,
        labels=labels,
        teacher=teacher,
        terms=terms,
        normalizer=max(len(rows), 1) if normalizer is None else normalizer,
        chunk_size=max(min(_chunk_size(weight) if chunk_size is None else chunk_size, len(rows)), 1),
        wanted=wanted,
    )
    return LinearLoss(*_LinearLoss.apply(hidden, weight, bias, job))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the loss is, beside the tensors it is differentiated in."""

    rows: Tensor  # those with a label
    labels: Tensor
    teacher: TeacherHead | TopK | Samples | None
    terms: Terms
    normalizer: float | Tensor
    chunk_size: int
    wanted: list[bool]  # the gradients of hidden, weight, bias


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        head, teacher = _Head(weight, bias), None
        if isinstance(job.teacher, TeacherHead):
            _, teacher_weight, teacher_bias = job.teacher
            teacher = _Head(
                teacher_weight[: len(weight)], None if teacher_bias is None else teacher_bias[: len(weight)]
            )
        with torch.autocast(hidden.device.type, enabled=False):
            cross_entropy, soft, gradients = _evaluate(hidden, head, teacher, job)
        ctx.gradients = [
            None if part is None or gradient is None else gradient.to(part.dtype)
            for gradient, part in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        ctx.mark_non_differentiable(cross_entropy, soft)
        return job.terms.task_weight * cross_entropy + job.terms.teacher_weight * soft, cross_entropy, soft

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_distillation_loss has no second derivative: differentiate it without create_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None  # the last reference: .grad takes the tensors, not copies
        if gradients is None:
            raise RuntimeError(
                "linear_distillation_loss hands its gradients over in the first backward pass and keeps nothing for a "
                "second: add up the losses that share it and call backward() once."
            )
        if grad_loss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *gradients, None


class _Head:
    """A weight and its bias in the type that products are made in."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        device = weight.device.type
        dtype = weight.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def logits(self, hidden: Tensor, scale: float, out: Tensor) -> Tensor:
        """``scale * (hidden @ weight.T + bias)`` in the first rows of ``out``."""
        out = out[: len(hidden)]
        if self.bias is None:
            return out.addmm_(hidden.to(self.dtype), self.weight.t(), beta=0, alpha=scale)
        return torch.addmm(self.bias * scale, hidden.to(self.dtype), self.weight.t(), alpha=scale, out=out)


def _evaluate(
    hidden: Tensor, head: _Head, teacher: _Head | None, job: _Job
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Mean cross-entropy, mean divergence with its factor, and the wanted gradients, all summed in float32."""
    sums = block_type = torch.promote_types(head.dtype, torch.float32)
    size, block_size = job.chunk_size, _block_size(hidden.device, len(head.weight))
    scale, kernel = 1.0, _kernel(head, job)
    if kernel is not None:
        scale, block_loss = 1 / job.terms.temperature, partial(kernel, job.terms)
        block_size, block_type = size, head.dtype
    elif teacher is not None and (job.terms.kind != "forward_kl" or len(teacher.weight) < len(head.weight)):
        block_loss = partial(autograd_block, job.terms)
    else:
        blocks = 1 if teacher is None else 2
        scratch = head.weight.new_empty(blocks, min(block_size, size), len(head.weight), dtype=sums)
        block_loss = partial(cross_entropy_block, job.terms, scratch)
        if job.teacher is not None:
            scale, block_loss = 1 / job.terms.temperature, partial(forward_kl_block, job.terms, scratch)

    room = head.weight.new_empty(size, len(head.weight))
    teacher_room = room if teacher is None else teacher.weight.new_empty(size, len(teacher.weight))
    values = hidden.new_zeros(3, len(job.rows), 1, dtype=sums)
    grad_hidden, grad_weight, grad_bias = gradients = [
        part.new_zeros(part.shape, dtype=sums) if part is not None and wanted else None
        for part, wanted in zip((hidden, head.weight, head.bias), job.wanted, strict=True)
    ]
    for start in range(0, len(job.rows), size):
        rows = job.rows[start : start + size]
        states, labels = hidden[rows].to(head.dtype), job.labels[rows, None]
        logits = head.logits(states, scale, room)
        if teacher is not None and isinstance(job.teacher, TeacherHead):
            target: Any = teacher.logits(job.teacher.hidden[rows], scale, teacher_room)
        else:
            target = _take(job.teacher, rows)
        chunk_values = values[:, start : start + size]
        for first in range(0, len(rows), block_size):
            block = slice(first, first + block_size)
            wide = logits[block].to(block_type)  # the rows themselves where they have that type
            block_values = block_loss(wide, labels[block], _take(target, block))
            chunk_values[:, block] = torch.stack(block_values)
            if wide.dtype != logits.dtype:
                logits[block] = wide
        unit = chunk_values[2].div_(job.normalizer)
        if grad_hidden is not None:
            grad_hidden[rows] = (logits @ head.weight) * unit
        if grad_weight is not None:
            _add_product(grad_weight, logits.t(), (states * unit).to(head.dtype))
        if grad_bias is not None:
            _add_product(grad_bias[:, None], logits.t(), unit.to(head.dtype))
    cross_entropy, soft = values[:2].sum((1, 2)) / job.normalizer
    return cross_entropy, job.terms.factor * soft, gradients


def _take(target: Any, rows: Tensor | slice) -> Any:
    if isinstance(target, tuple):
        return type(target)(*(part[rows] for part in target))
    return None if target is None else target[rows]


def _kernel(head: _Head, job: _Job) -> Callable[..., BlockValues] | None:
    """The one kernel that the loss of a block is on a GPU, if it has one."""
    device = head.weight.device
    if device.type != "cuda" or head.dtype == torch.float64:
        return None
    if job.teacher is not None and not isinstance(job.teacher, TeacherHead):
        reason = "there is none for a stored teacher"
    elif job.teacher is not None and job.terms.kind != "forward_kl":
        reason = f"there is none for '{job.terms.kind}'"
    elif find_spec("triton") is None:
        reason = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (7, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than what Triton supports"
    else:
        from hf_transfer.linear_kernels import triton_block

        return triton_block
    _say_once(f"The loss runs in some twenty operations on the GPU, not as one kernel: {reason}.")
    return None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # rounded nowhere between
    else:
        total.add_(left @ right)


def _chunk_size(weight: Tensor) -> int:
    """Rows, a multiple of 64, whose logits are held at once."""
    held = _HELD.get(weight.device.type, _HELD["other"])
    return min(max(held // len(weight) // 64, 1) * 64, _MOST_ROWS)


def _block_size(device: torch.device, vocabulary: int) -> int:
    """Rows that the elementwise stages take at once: on a CPU as many as stay in its caches."""
    numbers = _CACHED * torch.get_num_threads() if device.type == "cpu" else _GPU_BLOCK
    return max(numbers // vocabulary, 1)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: TeacherHead | TopK | Samples | None,
    kind: str,
    chunk_size: int | None,
) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ConfigurationError(f"chunk_size is {chunk_size}: expected a number of rows of at least 1.")
    rows, vocabulary = len(labels), len(weight)
    shapes = [
        ("hidden", hidden, (rows, weight.shape[-1])),
        ("weight", weight, (vocabulary, hidden.shape[-1])),
        ("labels", labels, (rows,)),
        ("bias", bias, (vocabulary,)),
    ]
    tokens = [("labels", labels[labels != IGNORED])]
    if isinstance(teacher, TeacherHead):
        width = teacher.hidden.shape[-1]
        sizes: tuple[tuple[int, ...], ...] = ((rows, width), (len(teacher.weight), width), (len(teacher.weight),))
    elif teacher is not None:
        if kind != "forward_kl":
            raise ConfigurationError(
                f"A stored teacher has no '{kind}': expected 'forward_kl', the one divergence that what is stored is "
                "enough for."
            )
        sizes = ((rows, teacher.ids.shape[-1]), (rows, teacher.ids.shape[-1]), (rows,))
        tokens.append(("teacher.ids", teacher.ids))
    if teacher is not None:
        names = (f"teacher.{name}" for name in teacher._fields)
        shapes += zip(names, teacher, sizes, strict=True)
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ConfigurationError(f"'{name}' has the shape {tuple(tensor.shape)}: expected {shape}.")
    for name, ids in tokens:
        if ids.numel() and not (0 <= ids.min() and ids.max() < vocabulary):
            found = ids.min() if ids.min() < 0 else ids.max()
            raise ConfigurationError(
                f"'{name}' holds the token {int(found)}: expected 0 to {vocabulary - 1}, the rows of weight."
            )
