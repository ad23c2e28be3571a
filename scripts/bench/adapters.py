"""What bottleneck adapters cost beside full fine-tuning and LoRA: a training step, and a forward pass in use.

    python scripts/bench/adapters.py [--model NAME] [--rounds 5]

MiniLM with a new head on 32 texts of 64 tokens, AdamW, in eval mode but for gradients: CPU seconds of the process at
one thread, variants taking turns, medians over rounds after one that does not count, as shares of the first row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import BottleneckConfig
from hf_transfer.checkpoints import resolve

BATCH, LENGTH, WIDTH = 32, 64, 48

VARIANTS: dict[str, tuple[Any, float | None]] = {
    "full fine-tuning": (None, None),
    "LoRA r=8, all linear layers": (lambda: LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"), None),
    "bottleneck, Houlsby": (lambda: bottleneck(placement="houlsby"), 0.65),
    "bottleneck, Pfeiffer": (lambda: bottleneck(placement="pfeiffer"), 0.65),
    "bottleneck, Pfeiffer, top three blocks": (
        lambda: bottleneck(placement="pfeiffer", layers_to_transform=[3, 4, 5]),
        0.45,
    ),
}


def bottleneck(**options: Any) -> BottleneckConfig:
    return BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=WIDTH, **options)


def alternately(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    turns = []
    for _ in range(rounds + 1):
        turn = {}
        for name, work in works.items():
            start = time.process_time()
            work()
            turn[name] = time.process_time() - start
        turns.append(turn)
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(resolve(options.model))
    tokens = torch.randint(1000, 20_000, (BATCH, LENGTH))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    steps: dict[str, Callable[[], object]] = {}
    uses: dict[str, Callable[[], object]] = {}
    sizes: dict[str, float] = {}
    for name, (make, _) in VARIANTS.items():
        model = AutoModelForSequenceClassification.from_config(config).eval()
        whole = sum(parameter.numel() for parameter in model.parameters())
        if make is not None:
            model = get_peft_model(model, make()).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes[name] = sum(parameter.numel() for parameter in trained) / whole
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def use(model: Any = model) -> None:
            with torch.no_grad():
                for _ in range(2):
                    model(**batch)

        steps[name], uses[name] = step, use
    trained_in, used_in = alternately(options.rounds, steps), alternately(options.rounds, uses)
    print(
        "| | trained share | training step | of full | goal | forward, of the base's |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, (_, goal) in VARIANTS.items():
        share, first = trained_in[name], next(iter(VARIANTS))
        print(
            f"| {name} | {sizes[name]:.1%} | {share * 1e3:,.0f} ms | {share / trained_in[first]:.2f} | "
            f"{'' if goal is None else f'{goal:.2f}'} | {used_in[name] / used_in[first]:.3f} |"
        )


if __name__ == "__main__":
    main()
