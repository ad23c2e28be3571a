"""What a whole run of gradual unfreezing costs: the head for one epoch, then one block more in each epoch.

    python scripts/bench/unfreezing.py [--model NAME] [--examples 256] [--rounds 2]

Three runs of the same number of epochs, taken alternately in one process: full fine-tuning, the schedule by plain
freezing, and the schedule with the frozen prefix's activations cached (the pass that fills the cache included).
Goals: cached <= 0.6 of full fine-tuning and <= 0.8 of plain freezing. CPU seconds of the process at one thread.
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
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import GradualUnfreeze, TransferTrainer, block_names
from hf_transfer.checkpoints import resolve

BATCH, LENGTH = 32, 64


def run(name: str, examples: int, arm: str) -> float:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    tokens = torch.randint(5, 900, (examples, LENGTH))
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    rows = Dataset.from_dict(columns)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=len(block_names(model)) + 1,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = TransferTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            unfreeze=None if arm == "full" else GradualUnfreeze(),
            frozen_prefix_cache=f"{folder}/prefix" if arm == "cached" else None,
        )
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = str(resolve(options.model))
    rounds = [
        {arm: run(name, options.examples, arm) for arm in ("full", "frozen", "cached")} for _ in range(options.rounds)
    ]
    for arm in ("full", "frozen", "cached"):
        print(f"{arm:>8}: {statistics.median(row[arm] for row in rounds):8.1f} s")
    for arm, beside, goal in (("cached", "full", 0.6), ("cached", "frozen", 0.8), ("frozen", "full", None)):
        ratio = statistics.median(row[arm] / row[beside] for row in rounds)
        print(f"{arm} / {beside}: {ratio:.3f}" + (f" (goal <= {goal})" if goal else ""))


if __name__ == "__main__":
    main()
