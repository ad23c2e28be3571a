"""What distillation costs with a big vocabulary: time and memory of a training step, ours beside its peers.

    pip install --no-deps --target PEERS trl==1.16.0 liger-kernel==0.8.5
    PYTHONPATH=PEERS python scripts/bench/distill.py [--vocabularies 32000 128256] [--rounds 3]

A step is the forward passes, the loss, backward and AdamW of a Llama student (hidden 128, 2 layers) on 4 x 256 tokens,
with a Llama teacher (hidden 256, 4 layers), T = 2, half the weight on the divergence, float32. Seconds are CPU seconds
of the process at one thread, the median of its steps after the first; MiB is the process's peak over all steps (Linux)
above its level before the first. Every figure comes from a process of its own, variants take turns, and the table has
the medians over rounds. The offline variants read a top 64, or 12 draws per token, taken from the teacher before.
Loss and gradients are compared first: online variants with the naive one, offline ones with the same loss of full
logits. A peer that is not installed is said and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

BATCH, LENGTH, STEPS = 4, 256, 3
TEMPERATURE, ALPHA, TOP_K, DRAWS = 2.0, 0.5, 64, 12

VARIANTS = {
    "naive": "logits, F.kl_div, F.cross_entropy",
    "trl": "TRL chunked divergence + its log-probabilities",
    "liger": "Liger fused JSD (beta 0, compiled, chunk 256)",
    "plain": "student alone, transformers' loss",
    "plain_fused": "student alone, fused cross-entropy",
    "online": "fused, teacher's head",
    "top_k": f"fused, stored top {TOP_K}",
    "samples": f"fused, {DRAWS} stored draws",
}
CHECKED_BY = {"trl": "naive", "liger": "naive", "online": "naive", "plain_fused": "plain"}
CHECKED_BY |= {"top_k": "top_k_of_logits", "samples": "samples_of_logits"}
PEERS = {"trl": "trl", "liger": "liger_kernel"}

# (figure, variant, of which other variant's): at most, by vocabulary
GOALS = {
    ("seconds", "online", "naive"): {32_000: 0.40, 128_256: 0.25},
    ("seconds", "online", "trl"): {32_000: 0.22, 128_256: 0.22},
    ("seconds", "online", "liger"): {32_000: 0.75, 128_256: 0.80},
    ("MiB", "online", "naive"): {32_000: 0.28, 128_256: 0.20},
    ("MiB", "online", "liger"): {32_000: 1.00, 128_256: 1.00},
    ("seconds", "top_k", "plain"): {32_000: 0.75, 128_256: 0.90},
    ("seconds", "samples", "plain"): {32_000: 0.75, 128_256: 0.90},
}


def llama(vocabulary: int, hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * hidden,
            initializer_range=0.1,
            use_cache=False,
        )
    )


def stored_targets(teacher: Any, tokens: Any, variant: str) -> Any:
    """What the offline variants train on, one row per predicted token."""
    import torch

    from hf_transfer.targets import Samples, TopK

    rows = []
    with torch.no_grad():
        for row in tokens:
            log_p = (teacher(row[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            if variant.startswith("top_k"):
                values, ids = log_p.topk(TOP_K)
                rows.append((ids, values, log_p.scatter(-1, ids, -math.inf).logsumexp(-1)))
            else:
                ids = torch.multinomial(log_p.exp(), DRAWS, replacement=True)
                rows.append((ids, torch.full(ids.shape, 1 / DRAWS), -(log_p.exp() * log_p).sum(-1)))
    parts = [torch.cat(part) for part in zip(*rows, strict=True)]
    return TopK(*parts) if variant.startswith("top_k") else Samples(*parts)


def loss_of(variant: str, student: Any, teacher: Any, stored: Any) -> Callable[[Any], Any]:
    """The loss of one batch of tokens."""
    import torch
    from torch.nn import functional

    from hf_transfer.functional import sampled_divergence, top_k_divergence
    from hf_transfer.linear_loss import TeacherHead, linear_distillation_loss

    def states(model: Any, tokens: Any) -> Any:
        return model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)

    def fused(tokens: Any) -> Any:
        target = stored
        if teacher is not None:
            with torch.no_grad():
                target = TeacherHead(states(teacher, tokens), teacher.lm_head.weight)
        return linear_distillation_loss(
            states(student, tokens),
            student.lm_head.weight,
            tokens[:, 1:].flatten(),
            target,
            task_weight=1.0 if target is None else 1 - ALPHA,
            teacher_weight=ALPHA,
            temperature=TEMPERATURE,
        ).loss

    def plain(tokens: Any) -> Any:
        return student(tokens, labels=tokens).loss

    def naive(tokens: Any) -> Any:
        logits, labels = student(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        if variant == "top_k_of_logits":
            soft = top_k_divergence(logits, *stored, temperature=TEMPERATURE).mean()
        elif variant == "samples_of_logits":
            soft = sampled_divergence(logits, *stored, temperature=TEMPERATURE).mean()
        else:
            with torch.no_grad():
                teacher_logits = teacher(tokens).logits[:, :-1].flatten(0, 1)
            log_q, log_p = (x.div(TEMPERATURE).log_softmax(-1) for x in (logits, teacher_logits))
            soft = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return (1 - ALPHA) * functional.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * soft

    def trl(tokens: Any) -> Any:
        from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        hidden, weight = states(student, tokens), student.lm_head.weight
        with torch.no_grad():
            teacher_hidden = states(teacher, tokens)
        soft, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher.lm_head.weight, None, 0.0, TEMPERATURE
        )
        labels = tokens[:, 1:].flatten()
        log_probabilities, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )
        return ALPHA * TEMPERATURE**2 * soft.mean() - (1 - ALPHA) * log_probabilities.mean()

    def liger(tokens: Any) -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        jsd = LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - ALPHA,
            weight_soft_loss=ALPHA * TEMPERATURE**2,
            beta=0.0,
            temperature=TEMPERATURE,
            chunk_size=256,
        )
        with torch.no_grad():
            teacher_hidden = states(teacher, tokens)
        return jsd(
            states(student, tokens),
            student.lm_head.weight,
            teacher_hidden,
            teacher.lm_head.weight,
            tokens[:, 1:].flatten(),
        )

    full_logits = variant == "naive" or variant.endswith("of_logits")
    return {"plain": plain, "trl": trl, "liger": liger}.get(variant, naive if full_logits else fused)


def run(variant: str, vocabulary: int, gradients: str | None) -> None:
    """One variant in this process: prints its figures, or saves the loss and gradients of a first step."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH))
    student, teacher, stored = llama(vocabulary, 128, 2), llama(vocabulary, 256, 4).eval(), None
    if not variant.startswith(("naive", "trl", "liger", "online")):
        if not variant.startswith("plain"):
            stored = stored_targets(teacher, tokens, variant)
        teacher = None
    loss = loss_of(variant, student, teacher, stored)
    if gradients is not None:
        value = loss(tokens)
        value.backward()
        parts = {name: part.grad for name, part in student.named_parameters() if "embed" not in name}
        save_file({"loss": value.detach(), **parts}, gradients)
        return
    if variant == "liger":
        import torch._inductor.compile_fx  # noqa: F401  (what compiling imports is no part of the step)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present level
    level, seconds = memory("VmRSS"), []
    for _ in range(1 + STEPS):
        start = time.process_time()
        loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "MiB": memory("VmHWM") - level}))


def memory(field: str) -> float:
    """A line of the process's status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) / 1024


def in_a_process(variant: str, vocabulary: int, *rest: str) -> str:
    command = [sys.executable, __file__, "--variant", variant, "--vocabularies", str(vocabulary), *rest]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(variants: list[str], vocabulary: int) -> None:
    """Print how far loss and gradients are from those they are checked by; stop where they differ."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        references: dict[str, Any] = {}
        for variant in (name for name in variants if name in CHECKED_BY):
            found, expected = (f"{folder}/{name}.safetensors" for name in (variant, CHECKED_BY[variant]))
            if expected not in references:
                in_a_process(CHECKED_BY[variant], vocabulary, "--gradients", expected)
                references[expected] = load_file(expected)
            in_a_process(variant, vocabulary, "--gradients", found)
            errors = {
                name: float((part - references[expected][name]).norm() / references[expected][name].norm())
                for name, part in load_file(found).items()
            }
            print(f"  {variant}: loss within {errors.pop('loss'):.1e}, gradients within {max(errors.values()):.1e}")
            if max(errors.values()) > 1e-3:
                raise SystemExit(f"{variant} does not compute what {CHECKED_BY[variant]} does: {errors}")


def measure(variants: list[str], vocabulary: int, rounds: int) -> dict[str, dict[str, float]]:
    figures = [{name: json.loads(in_a_process(name, vocabulary)) for name in variants} for _ in range(rounds)]
    return {
        name: {figure: statistics.median(turn[name][figure] for turn in figures) for figure in ("seconds", "MiB")}
        for name in variants
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run(options.variant, options.vocabularies[0], options.gradients)
        return
    variants = list(VARIANTS)
    for name, package in PEERS.items():
        if find_spec(package) is None:
            print(f"{package} is not installed: left out")
            variants.remove(name)
    for vocabulary in options.vocabularies:
        print(f"vocabulary {vocabulary:,}")
        compare(variants, vocabulary)
        figures = measure(variants, vocabulary, options.rounds)
        for name in variants:
            row = figures[name]
            print(f"  {name:<12} {VARIANTS[name]:<48}{row['seconds']:>8.2f} s{row['MiB']:>8.0f} MiB")
        for (figure, name, other), goals in GOALS.items():
            if {name, other} <= figures.keys():
                ratio = figures[name][figure] / figures[other][figure]
                print(f"  {figure} of {name} / {other}: {ratio:.2f}  (goal {goals.get(vocabulary, math.nan):.2f})")


if __name__ == "__main__":
    main()
