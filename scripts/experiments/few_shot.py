"""Which way to fine-tune a small encoder on few labels: SST-2, TREC-6, AG News, 100 and 500 labelled examples.

    python scripts/experiments/few_shot.py --data DATA [--out out/few_shot] [--sets trec sst2] [--sizes 100]

DATA holds sst2/ (Socher et al. 2013; stanfordnlp/sst2 on the Hub), sentcls/trec_*.jsonl (Li & Roth 2002;
CogComp/trec) and ag_news/ (Zhang et al. 2015; fancyzhx/ag_news). Every set is cut once into a pool to draw training
examples from, 300 validation and 500 test examples, with no text in two of them. All arms get the same number of
epochs. An arm's learning rate is chosen once, on TREC's validation data at 100 labels with the first seed, and used
everywhere. Three seeds: each draws other training examples, the same for all arms. Finished runs are read, not
repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import Recipe

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EPOCHS = {100: 10, 500: 3}
VALIDATION, TEST = 300, 500
RATES = [1e-4, 3e-4, 1e-3]
LORA_RATES = [3e-4, 1e-3, 3e-3, 1e-2]

ARMS: dict[str, dict[str, Any]] = {
    "from scratch": {"recipe": "fine_tune", "model": {"pretrained": False}},
    "feature extraction": {"recipe": "feature_extraction"},
    "feature extraction, mean pooling": {"recipe": "feature_extraction", "model": {"pooling": "mean"}},
    "full fine-tuning": {"recipe": "fine_tune"},
    "+ discriminative rates": {"recipe": "fine_tune", "layer_decay": 0.8},
    "+ gradual unfreezing": {"recipe": "gradual_unfreeze", "unfreeze": {"until": 0.5}},
    "+ both": {"recipe": "gradual_unfreeze", "unfreeze": {"until": 0.5}, "layer_decay": 0.8},
    "+ both, mean pooling": {
        "recipe": "gradual_unfreeze",
        "unfreeze": {"until": 0.5},
        "layer_decay": 0.8,
        "model": {"pooling": "mean"},
    },
    "LoRA r=8": {"recipe": "lora", "adapter": {"r": 8, "lora_alpha": 16}},
}
SEARCHED = [arm for arm in ARMS if not arm.startswith("feature")]


def read(path: Path) -> Iterator[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield {"text": row["text"].strip(), "label": row["label"]}


def splits_of(name: str, data: Path) -> dict[str, list[dict[str, Any]]]:
    """A pool to draw from, validation and test, drawn with a fixed seed; no text is in two of them."""
    shuffle = random.Random(0).shuffle
    if name == "sst2":
        pool = list(read(data / "sst2/train_phrases.jsonl.gz"))
        validation, test = list(read(data / "sst2/dev.jsonl")), list(read(data / "sst2/test.jsonl"))
    elif name == "trec":
        pool, test = list(read(data / "sentcls/trec_train.jsonl")), list(read(data / "sentcls/trec_test.jsonl"))
        shuffle(pool)
        validation, pool = pool[:VALIDATION], pool[VALIDATION:]
    else:
        rows = list(read(data / "ag_news/test7600.jsonl.gz"))
        shuffle(rows)
        validation, test, pool = rows[:VALIDATION], rows[VALIDATION : VALIDATION + TEST], rows[VALIDATION + TEST :]
    for rows in (validation, test, pool):
        shuffle(rows)
    test = test[:TEST]
    taken = {row["text"] for row in test}
    validation = [row for row in validation if row["text"] not in taken][:VALIDATION]
    taken |= {row["text"] for row in validation}
    return {"train": [row for row in pool if row["text"] not in taken], "validation": validation, "test": test}


def write_splits(name: str, data: Path, folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits_of(name, data).items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str((folder / f"{split}.jsonl").resolve()) for split in ("train", "validation", "test")}


def compare(folder: Path, files: dict[str, str], size: int, arms: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    values = {
        "recipe": "compare",
        "model": {"name": MODEL},
        "data": {"path": "json", "data_files": files, "max_length": 48, "train_size": size},
        "training": {
            "output_dir": str(folder),
            "num_train_epochs": EPOCHS[size],
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 3e-4,
            "warmup_steps": 0.1,
            "save_strategy": "no",
            "logging_steps": 10,
        },
        "arms": arms,
        "seeds": seeds,
    }
    return Recipe.from_values(values).run(resume=folder.exists()).metrics


def chosen_rates(out: Path, files: dict[str, str]) -> dict[str, float]:
    """The learning rate of every arm by TREC's validation data at 100 labels, first seed."""
    grids = {arm: LORA_RATES if arm.startswith("LoRA") else RATES for arm in SEARCHED}
    arms = {arm: {**ARMS[arm], "search": {"training.learning_rate": grid}} for arm, grid in grids.items()}
    results = compare(out / "choice", files, 100, arms, [0])
    return {arm["name"]: arm["chosen"]["training.learning_rate"] for arm in results["arms"]}


def table(out: Path) -> str:
    """All finished comparisons in one: an arm per row, a set and size per column."""
    scores = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*-*/results.json"))}
    lines = ["| | " + " | ".join(scores) + " |", "|---|" + "---:|" * len(scores)]
    for arm in ARMS:
        cells = [next(each["scores"] for each in result["arms"] if each["name"] == arm) for result in scores.values()]
        lines.append(f"| {arm} | " + " | ".join(f"{mean(cell):.3f} ± {stdev(cell):.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/few_shot"))
    parser.add_argument("--sets", nargs="*", default=["trec", "sst2", "ag_news"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 500])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    rates = chosen_rates(options.out, write_splits("trec", options.data, options.out / "data/trec"))
    arms = {
        arm: {**settings, **({"training": {"learning_rate": rates[arm]}} if arm in rates else {})}
        for arm, settings in ARMS.items()
    }
    for name in options.sets:
        files = write_splits(name, options.data, options.out / "data" / name)
        for size in options.sizes:
            compare(options.out / f"{name}-{size}", files, size, arms, list(range(options.seeds)))
    print(f"\nTest accuracy, mean and standard deviation over the seeds:\n\n{table(options.out)}")


if __name__ == "__main__":
    main()
