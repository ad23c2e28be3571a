"""What a language model's head and distillation loss cost on a GPU: ours, Liger, TRL, plain logits and the floor.

    pip install --no-deps --target PEERS trl==1.16.0 liger-kernel==0.8.5
    PYTHONPATH=PEERS python scripts/bench/distill_cuda.py [--tokens 8192] [--vocabularies 32000 128256]

The work is the loss of TOKENS tokens in bfloat16 between last hidden states and their gradients, student width 2,048
and teacher width 4,096, T = 2, half the weight on the divergence: forward and backward, no model around it. The floor
is the four matrix products that no loss can do without, undivided. Milliseconds are medians by CUDA events, variants
taking turns; GiB is the peak above inputs and weights. Every variant's gradients are compared with those of plain
logits in float32 first (relative error of the hidden states' and of the weight's). A peer that cannot be imported
is said and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import linear_loss
from hf_transfer.linear_loss import TeacherHead, linear_distillation_loss

TEMPERATURE, ALPHA = 2.0, 0.5
WIDTH, TEACHER_WIDTH = 2048, 4096

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def fused(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    return linear_distillation_loss(
        hidden,
        weight,
        labels,
        TeacherHead(teacher_hidden, teacher_weight),
        task_weight=1 - ALPHA,
        teacher_weight=ALPHA,
        temperature=TEMPERATURE,
    ).loss


def without_kernel(*parts: Tensor) -> Tensor:
    with patch.object(linear_loss, "_kernel", lambda *_: None):
        return fused(*parts)


def cross_entropy_alone(hidden: Tensor, weight: Tensor, _: Tensor, __: Tensor, labels: Tensor) -> Tensor:
    return linear_distillation_loss(hidden, weight, labels).loss


def plain_cross_entropy(hidden: Tensor, weight: Tensor, _: Tensor, __: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), labels)


def naive(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    with torch.no_grad():
        log_p = (teacher_hidden @ teacher_weight.t()).float().div_(TEMPERATURE).log_softmax(-1)
    log_q = (logits / TEMPERATURE).log_softmax(-1)
    soft = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - ALPHA) * functional.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * soft


def liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA * TEMPERATURE**2, beta=0.0, temperature=TEMPERATURE
    )
    return jsd(hidden, weight, teacher_hidden, teacher_weight, labels)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, _: Tensor, __: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def trl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    soft, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0, TEMPERATURE
    )
    log_probabilities, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
    )
    return ALPHA * TEMPERATURE**2 * soft.mean() - (1 - ALPHA) * log_probabilities.mean()


DISTILLATION: dict[str, Loss] = {
    "naive": naive,
    "trl": trl,
    "liger": liger,
    "fused, torch": without_kernel,
    "fused, Triton": fused,
}
CROSS_ENTROPY: dict[str, Loss] = {
    "plain": plain_cross_entropy,
    "liger": liger_cross_entropy,
    "fused, Triton": cross_entropy_alone,
}
PEERS = {"trl": "trl.kernels.chunked_divergence", "liger": "liger_kernel.chunked_loss"}


def inputs(tokens: int, vocabulary: int) -> list[Tensor]:
    """Hidden states and weights whose logits have a standard deviation of about 2, and labels."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda", generator=generator)).bfloat16()

    parts = [normal(tokens, WIDTH), normal(vocabulary, WIDTH, scale=2 / WIDTH**0.5)]
    parts += [normal(tokens, TEACHER_WIDTH), normal(vocabulary, TEACHER_WIDTH, scale=2 / TEACHER_WIDTH**0.5)]
    for part in parts[:2]:
        part.requires_grad_()
    return [*parts, torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)]


def gradients(loss: Loss, parts: list[Tensor]) -> list[Tensor]:
    value = loss(*parts)
    return [value.detach(), *torch.autograd.grad(value, parts[:2])]


def milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    level = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - level) / 2**30


def compare(title: str, variants: dict[str, Loss], tokens: int, vocabulary: int, rounds: int) -> None:
    parts = inputs(tokens, vocabulary)
    exact_parts = [part.detach().float().requires_grad_() for part in inputs(1024, vocabulary)[:4]]
    small = inputs(1024, vocabulary)
    reference, *_ = variants.values()
    exact = gradients(reference, [*exact_parts, small[-1]])
    print(f"{title}, vocabulary {vocabulary:,}, {tokens:,} tokens")
    errors = {}
    for name, loss in variants.items():
        found = gradients(loss, small)
        errors[name] = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found[1:], exact[1:], strict=True))
    del exact, exact_parts, small, found

    hidden, weight, teacher_hidden, teacher_weight, _ = parts
    logits, grad = torch.empty(tokens, vocabulary, dtype=torch.bfloat16, device="cuda").normal_(), parts[0].detach()

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            logits @ weight
            logits.t() @ grad
            if title == "distillation":
                torch.mm(teacher_hidden, teacher_weight.t(), out=logits)

    peaks = {name: peak(lambda loss=loss: gradients(loss, parts)) for name, loss in variants.items()}
    works = {"matrix products": products}
    works |= {name: lambda loss=loss: gradients(loss, parts) for name, loss in variants.items()}
    for work in works.values():
        milliseconds(work)
    turns = [{name: milliseconds(work) for name, work in works.items()} for _ in range(rounds)]
    times = {name: statistics.median(turn[name] for turn in turns) for name in works}
    for name, time in times.items():
        row = f"  {name:<16}{time:>9.2f} ms  {times['matrix products'] / time:>5.2f} of the floor"
        if name in peaks:
            row += f"  {peaks[name]:>6.2f} GiB  gradients within {errors[name]:.1e}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    missing = set()
    for name, module in PEERS.items():
        try:
            import_module(module)
        except ImportError as error:
            print(f"{module} is left out: {error}")
            missing.add(name)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    for vocabulary in options.vocabularies:
        for title, variants in (("distillation", DISTILLATION), ("cross-entropy", CROSS_ENTROPY)):
            present = {name: loss for name, loss in variants.items() if name not in missing}
            compare(title, present, options.tokens, vocabulary, options.rounds)


if __name__ == "__main__":
    main()
