"""The fused loss of logits on a GPU: one Triton kernel in place of some twenty passes over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_transfer.linear_blocks import BlockValues, Terms

_BLOCK = 2048  # tokens read at once


def triton_block(terms: Terms, logits: Tensor, labels: Tensor, target: Tensor | None) -> BlockValues:
    """Forward KL, unless ``target`` is None, and cross-entropy of logits z that come divided by T.

    Each row's logits are read twice, for their sums and for the gradient that replaces them, and everything between is
    float32 in registers; see :func:`~hf_transfer.linear_blocks.forward_kl_block` for the formulas.

    Args:
        terms: What to sum.
        logits: (b, V) in float32, bfloat16 or float16, rows contiguous; overwritten by the gradient.
        labels: (b, 1).
        target: The teacher's logits (b, Vt), Vt <= V, divided by T, rows contiguous; the divergence is over
            its tokens.

    Returns:
        Values in float32; ``unit`` is 1.
    """
    rows, vocabulary = logits.shape
    values = logits.new_empty(2, rows, 1, dtype=torch.float32)
    teacher = logits if target is None else target
    pull = terms.teacher_weight * terms.factor / terms.temperature
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _rows[(rows,)](
            logits,
            teacher,
            labels,
            values,
            rows,
            vocabulary,
            teacher.shape[1],
            logits.stride(0),
            teacher.stride(0),
            float(terms.temperature),
            float(terms.task_weight),
            float(pull),
            has_teacher=target is not None,
            differentiate=terms.differentiate,
            block=_BLOCK,
            num_warps=8,
        )
    return BlockValues(values[0], values[1], torch.ones_like(values[0]))


@triton.jit(do_not_specialize=["rows", "temperature", "task_weight", "pull"])
def _rows(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    labels,
    values,
    rows,
    vocabulary,
    shared,
    stride,
    teacher_stride,
    temperature,
    task_weight,
    pull,
    has_teacher: tl.constexpr,
    differentiate: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row. ``shared`` is Vt.

    Every lane keeps maxima and sums of its own until the end: nothing is reduced inside the loop.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    at_label = tl.load(logits + label).to(tl.float32)
    lanes = tl.arange(0, block)

    highest = tl.full((block,), -1e38, tl.float32)
    task_sum = tl.zeros((block,), tl.float32)
    highest_q = tl.full((block,), -1e38, tl.float32)
    sum_q = tl.zeros((block,), tl.float32)
    highest_p = tl.full((block,), -1e38, tl.float32)
    sum_p = tl.zeros((block,), tl.float32)
    gap = tl.zeros((block,), tl.float32)
    for start in range(0, vocabulary, block):
        tokens = start + lanes
        z = tl.load(logits + tokens, mask=tokens < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, z)
        task_sum = task_sum * tl.exp(temperature * (highest - higher)) + tl.exp(temperature * (z - higher))
        if has_teacher:
            inside = tokens < shared
            t = tl.load(teacher + tokens, mask=inside, other=-float("inf")).to(tl.float32)
            known = tl.where(inside, z, -float("inf"))
            higher_q = tl.maximum(highest_q, known)
            sum_q = sum_q * tl.exp(highest_q - higher_q) + tl.exp(known - higher_q)
            highest_q = higher_q
            higher_p = tl.maximum(highest_p, t)
            decay, p = tl.exp(highest_p - higher_p), tl.exp(t - higher_p)
            sum_p = sum_p * decay + p
            gap = gap * decay + tl.where(t == -float("inf"), 0.0, p * (t - z))
            highest_p = higher_p
        highest = higher

    top = tl.max(highest)
    task_normalizer = temperature * top + tl.log(tl.sum(task_sum * tl.exp(temperature * (highest - top))))
    tl.store(values + row, task_normalizer - temperature * at_label)
    divergence = 0.0
    if has_teacher:
        top_q = tl.max(highest_q)
        normalizer = top_q + tl.log(tl.sum(sum_q * tl.exp(highest_q - top_q)))
        top_p = tl.max(highest_p)
        decay = tl.exp(highest_p - top_p)
        total_p = tl.sum(sum_p * decay)
        normalizer_p = top_p + tl.log(total_p)
        divergence = tl.sum(gap * decay) / total_p - normalizer_p + normalizer
    tl.store(values + rows + row, divergence)

    if differentiate:
        for start in range(0, vocabulary, block):
            tokens = start + lanes
            inside = tokens < vocabulary
            z = tl.load(logits + tokens, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = task_weight * (tl.exp(temperature * z - task_normalizer) - tl.where(tokens == label, 1.0, 0.0))
            if has_teacher:
                known = tl.where(tokens < shared, z, -float("inf"))
                t = tl.load(teacher + tokens, mask=tokens < shared, other=-float("inf")).to(tl.float32)
                q = tl.exp(known - normalizer)
                gradient += pull * (q - tl.exp(t - normalizer_p))
            tl.store(logits + tokens, gradient, mask=inside)
