"""What a step of TransferTrainer with every option off costs beside plain Trainer's, taken alternately in one process.

    python scripts/bench/overhead.py [--model NAME] [--rounds 8]

Goal: below 1.02 on the real model. The toy (two layers of width 16) shows the overhead itself, in microseconds.
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
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import TransferTrainer
from hf_transfer.checkpoints import resolve

BATCH, LENGTH = 32, 64


def trainer_of(kind: type[Trainer], config, steps: int, folder: str) -> Trainer:
    torch.manual_seed(0)
    tokens = torch.randint(5, 900, (steps * BATCH, LENGTH))
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    rows = Dataset.from_dict(columns)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return kind(AutoModelForSequenceClassification.from_config(config), arguments, train_dataset=rows)


def seconds_per_step(kind: type[Trainer], config, steps: int, folder: str) -> float:
    trainer = trainer_of(kind, config, steps, folder)
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    toy = BertConfig(
        vocab_size=1000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, config, steps in (
            ("toy", toy, 60),
            (options.model, AutoConfig.from_pretrained(resolve(options.model)), 4),
        ):
            pairs = [
                [seconds_per_step(kind, config, steps, folder) for kind in (Trainer, TransferTrainer)]
                for _ in range(options.rounds)
            ]
            plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(second / first for first, second in pairs)
            print(
                f"{name}: plain Trainer {plain * 1e3:.2f} ms, TransferTrainer {ours * 1e3:.2f} ms per step, "
                f"ratio {ratio:.3f} (median of {options.rounds} alternating pairs, CPU time, one thread)"
            )


if __name__ == "__main__":
    main()
