"""What the frozen prefix's cache saves: a training step as a share of full fine-tuning's, in turns in one process.

    python scripts/bench/prefix.py [--model NAME] [--rounds 8]

A step is forward, backward, clipping and AdamW of a sequence classifier on 32 examples of 64 tokens; with the cache it
includes reading the cached activations. CPU seconds of the process at one thread; the table has the median over rounds
of a variant's time over full fine-tuning's in the same round. The tokens are random: a step's time does not depend on
them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import PrefixCache, block_names, parameter_depths
from hf_transfer.checkpoints import resolve

BATCH, LENGTH, BATCHES = 32, 64, 3
GOALS = {(3, True): 0.46, (5, True): 0.17}


class Steps:
    """Training steps of one model, frozen up to a depth or not at all (-1)."""

    def __init__(self, name: str, folder: str) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_config(
            AutoConfig.from_pretrained(name), dtype=torch.float32
        )
        self.depths = parameter_depths(self.model)
        self.blocks = len(block_names(self.model))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        tokens = torch.randint(5, 900, (BATCHES * BATCH, LENGTH))
        columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
        self.rows = Dataset.from_dict({**columns, "example_index": torch.arange(len(tokens))})
        start = time.process_time()
        self.cache = PrefixCache.build(
            self.model, self.rows, default_data_collator, directory=folder, cuts=range(self.blocks + 1)
        )
        self.pass_seconds = (time.process_time() - start) / BATCHES

    def seconds(self, frozen: int, *, cached: bool) -> float:
        """The mean CPU time of a step in which depths up to ``frozen`` are closed."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.depths[name] > frozen)
        self.model.train()
        if cached:
            self.cache.install(frozen)
        start = time.process_time()
        for first in range(0, len(self.rows), BATCH):
            batch = default_data_collator([self.rows[row] for row in range(first, first + BATCH)])
            if cached:
                with self.cache.replay(batch):
                    loss = self.model(**batch).loss
            else:
                del batch["example_index"]
                loss = self.model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.cache.uninstall()
        return (time.process_time() - start) / BATCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(resolve(options.model), folder)
        half, most = steps.blocks // 2, steps.blocks - 1
        variants = [(half, False), (half, True), (most, False), (most, True), (steps.blocks, True)]
        steps.seconds(-1, cached=False)
        rounds = []
        for _ in range(options.rounds):
            full = steps.seconds(-1, cached=False)
            rounds.append({variant: steps.seconds(variant[0], cached=variant[1]) / full for variant in variants})
    print(f"{'frozen':<22}{'step / full step':>18}{'spread':>16}{'goal':>8}")
    for frozen, cached in variants:
        ratios = [ratio[frozen, cached] for ratio in rounds]
        label = f"{frozen} of {steps.blocks}, {'cached' if cached else 'plain'}"
        goal = GOALS.get((frozen, cached)) if steps.blocks == 6 else None
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
        print(f"{label:<22}{statistics.median(ratios):>18.3f}{spread:>16}{goal or '':>8}")
    print(f"last full step {full:.2f} s; filling the cache at every depth {steps.pass_seconds:.2f} s per batch, once")


if __name__ == "__main__":
    main()
