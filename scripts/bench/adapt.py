"""What domain adaptation costs: a DANN step beside plain Trainer's, DANN beside a two-forward loop, MMD beside cdist.

    python scripts/bench/adapt.py [--model NAME] [--rounds 7] [--data DATA] [--parts 1 2 3 4]

All at one thread, in CPU seconds of the process, variants taking turns, medians over rounds.

1. A step of DomainAdversarialTrainer on 16 + 16 texts of 64 tokens, beside one of plain Trainer on the same 32, all
   labelled. Goal: at most 1.05.
2. The five-kernel MMD of 256 + 256 features of width 384, forward and backward, beside a plain Trainer step on 512
   such texts. Goal: at most 0.02.
3. Only with DATA: 200 steps of DANN in scripts/experiments/digits.py (MNIST to USPS, 32 + 32 images), beside the plain
   loop of two forward passes there. Goal: at most 0.8.
4. The five-kernel MMD at width 384, forward and backward, beside the same from torch.cdist and autograd; their
   gradients are compared first. MiB is the peak of a process of its own above its level before. Goals: at most 0.5,
   0.45 and 0.17 of the time at 256, 1,024 and 4,096 rows of each domain, and below 100 MiB at 4,096.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import digits

from hf_transfer import DomainAdversarialTrainer, DomainPairs
from hf_transfer.checkpoints import resolve
from hf_transfer.discrepancy import MULTIPLES, mmd

LENGTH, WIDTH = 64, 384
SIZES = {256: 0.5, 1024: 0.45, 4096: 0.17}


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def alternately(rounds: int, *works: Callable[[], float]) -> list[float]:
    """The median of what each work gives, one after the other, after a first turn that does not count."""
    turns = [[work() for work in works] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def texts(count: int) -> Dataset:
    tokens = torch.randint(1000, 20_000, (count, LENGTH))
    return Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    )


def step(kind: type[Trainer], config: Any, rows: Any, batch: int, steps: int, folder: str) -> float:
    """CPU seconds of a training step."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = kind(AutoModelForSequenceClassification.from_config(config), arguments, train_dataset=rows)
    return seconds(trainer.train) / steps


def cdist_mmd(source: Tensor, target: Tensor) -> Tensor:
    """The biased five-kernel MMD as it is usually written."""
    rows = torch.cat([source, target])
    squared = torch.cdist(rows, rows).square()
    bandwidth = (squared.sum() / (len(rows) ** 2 - len(rows))).detach()
    kernel = sum(torch.exp(-squared / (multiple * bandwidth)) for multiple in MULTIPLES) / len(MULTIPLES)
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def samples(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, WIDTH, requires_grad=True), (torch.randn(n, WIDTH) + 0.2).requires_grad_()]


def gradients(loss: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*parts), parts))


def memory(field: str) -> float:
    """A line of the process's status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) / 1024


def peak(name: str, n: int) -> float:
    """MiB of one evaluation in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(n)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(name: str, n: int) -> None:
    loss = {"ours": mmd, "cdist": cdist_mmd}[name]
    gradients(loss, samples(16))
    parts = samples(n)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present level
    level = memory("VmRSS")
    gradients(loss, parts)
    print(memory("VmHWM") - level)


def digits_loop(data: Path, rounds: int, folder: str) -> tuple[float, float]:
    shift = replace(digits.SHIFTS["mnist-usps"], steps=200)
    domains = shift.read(data, 0)
    arguments = TrainingArguments(
        folder,
        max_steps=shift.steps,
        per_device_train_batch_size=shift.batch,
        learning_rate=digits.RATE,
        lr_scheduler_type=shift.schedule,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    pairs = DomainPairs(domains["source"], domains["target"])

    def ours() -> float:
        trainer = DomainAdversarialTrainer(
            shift.model(), arguments, train_dataset=pairs, data_collator=digits.default_data_collator
        )
        return seconds(trainer.train) / shift.steps

    def loop() -> float:
        model = shift.model()
        return seconds(lambda: digits.two_forwards(shift, model, domains, 0)) / shift.steps

    one, other = alternately(rounds, ours, loop)
    return one, other


def show(number: int, name: str, time: float, other: str, other_time: float, goal: float, rest: str = "") -> None:
    print(
        f"{number}. {name} {time * 1e3:.1f} ms, {other} {other_time * 1e3:.1f} ms: {other_time / time:.4f}  "
        f"(goal {goal}){rest}",
        flush=True,
    )


def compare_steps(model: str, rounds: int, folder: str, parts: list[int]) -> None:
    config = AutoConfig.from_pretrained(resolve(model))
    rows, pairs = texts(128), DomainPairs(texts(64), texts(64))
    if 1 in parts:
        plain, dann = alternately(
            rounds,
            lambda: step(Trainer, config, rows, 32, 4, folder),
            lambda: step(DomainAdversarialTrainer, config, pairs, 16, 4, folder),
        )
        show(1, "plain Trainer", plain, "DANN", dann, 1.05)
    if 2 in parts:
        both = samples(256)
        (added,) = alternately(rounds, lambda: seconds(lambda: gradients(mmd, both)))
        show(2, "plain Trainer", step(Trainer, config, texts(512), 512, 1, folder), "MMD", added, 0.02)


def compare_mmd(n: int, goal: float, rounds: int) -> None:
    parts = samples(n)
    both = zip(gradients(mmd, parts), gradients(cdist_mmd, parts), strict=True)
    error = max(float((one - other).norm() / other.norm()) for one, other in both)
    repeats = max(1024 // n, 1)

    def repeated(loss: Callable[..., Tensor]) -> float:
        return seconds(lambda: [gradients(loss, parts) for _ in range(repeats)]) / repeats

    rounds = max(rounds * 256 // n, 2)
    naive, ours = alternately(rounds, lambda: repeated(cdist_mmd), lambda: repeated(mmd))
    memories = f"; {peak('cdist', n):.0f} and {peak('ours', n):.0f} MiB, gradients within {error:.1e}"
    show(4, f"{n:,} + {n:,} rows: cdist", naive, "ours", ours, goal, memories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--parts", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_steps(options.model, options.rounds, folder, options.parts)
        if options.data is not None and 3 in options.parts:
            ours, loop = digits_loop(options.data, options.rounds, folder)
            show(3, "two forwards", loop, "DomainAdversarialTrainer", ours, 0.8)
    for n, goal in SIZES.items() if 4 in options.parts else ():
        compare_mmd(n, goal, options.rounds)


if __name__ == "__main__":
    main()
