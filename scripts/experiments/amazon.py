"""Sentiment across four kinds of Amazon reviews: is a domain's unlabelled text worth anything, and to which method?

    python scripts/experiments/amazon.py --data DATA [--out out/amazon] [--pairs books-kitchen ...] [--workers 1]

DATA holds amazon_mds/ (Blitzer et al. 2007): 2,000 labelled reviews of each of four domains, and 4,000 others of each,
whose labels are read only to train the ceiling. For every ordered pair of domains and every seed, 1,600 labelled
source reviews train, 400 choose; the target's 4,000 others are seen without labels, and its 2,000 labelled ones are
the test. all-MiniLM-L6-v2 with mean pooling, its two upper blocks open (the lower ones stay frozen in every arm),
96 tokens, 300 steps of 16 pairs, the critic at 1e-3. Evaluated every 100 steps. "last" is the first setting's last
step; the others choose among the steps of a method's finished settings: "source" by the accuracy on the source's 400,
"honest" by their deep embedded risk (You et al. 2019), "oracle" by the test. "or off" lets them take a step of source
only instead. The ceiling trains as long on 1,600 labelled reviews of the target's 4,000.

A figure is the mean over the pairs of each seed, then mean and standard deviation over seeds. Finished runs are read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import permutations, product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import DomainAdversarialTrainer, DomainAlignmentTrainer, DomainPairs, TransferTrainer
from hf_transfer.checkpoints import resolve
from hf_transfer.heads import add_mean_pooling
from hf_transfer.schedules import TopLevels
from hf_transfer.tasks import single_label_scores
from hf_transfer.training.label_free import selections

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DOMAINS = ("books", "dvd", "electronics", "kitchen")
LENGTH, STEPS, BATCH, HELD_OUT = 96, 300, 16, 400
OPEN = 3  # the mean is a block too
METHODS: dict[str, list[dict[str, Any]]] = {
    "source only": [{"discrepancy": "mmd", "weight": 0.0}],
    "MMD": [{"discrepancy": "mmd", "weight": 1.0}, {"discrepancy": "mmd", "weight": 0.3}],
    "CORAL": [{"discrepancy": "coral", "weight": 1e4}, {"discrepancy": "coral", "weight": 1e5}],
    "DANN": [{"weight": 1.0}, {"weight": 0.3}],
    "CDAN": [{"conditional": True, "weight": 1.0}, {"conditional": True, "weight": 0.3}],
}
CEILING: dict[str, Any] = {"ceiling": True}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(MODEL))


@cache
def reviews(data: Path, domain: str, labelled: bool) -> Dataset:
    """The 2,000 labelled reviews of a domain, or its 4,000 others, shuffled."""
    file = data / "amazon_mds" / ("labelled.jsonl.gz" if labelled else f"extra_{domain}.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["domain"] == domain]
    order = np.random.default_rng(0).permutation(len(rows))
    encoded = tokenizer()([rows[index]["text"] for index in order], truncation=True, max_length=LENGTH)
    return Dataset.from_dict({**encoded, "labels": [rows[index]["label"] for index in order]})


def name_of(setting: dict[str, Any]) -> str:
    return "ceiling" if setting == CEILING else "-".join(map(str, setting.values()))


def run(data: Path, out: Path, source: str, target: str, setting: dict[str, Any], seed: int) -> None:
    """Train one arm and note its evaluations."""
    done = out / f"{source}-{target}" / f"{name_of(setting)}-{seed}.json"
    if done.exists():
        return
    ceiling = setting == CEILING
    rows = reviews(data, target if ceiling else source, labelled=not ceiling).shuffle(seed=seed)
    validation, train = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, 2000))
    test = reviews(data, target, labelled=True)
    torch.manual_seed(seed)
    model = add_mean_pooling(AutoModelForSequenceClassification.from_pretrained(resolve(MODEL), num_labels=2))
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        str(out / "trainer" / str(os.getpid())),
        max_steps=STEPS,
        per_device_train_batch_size=2 * BATCH if ceiling else BATCH,
        per_device_eval_batch_size=100,
        learning_rate=3e-4,
        warmup_steps=30,
        eval_strategy="steps",
        eval_steps=STEPS // 3,
        seed=seed,
        tf32=cuda or None,
        dataloader_pin_memory=cuda,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    options: dict[str, Any] = {
        "data_collator": DataCollatorWithPadding(tokenizer()),
        "compute_metrics": lambda found: single_label_scores(found.predictions, found.label_ids),
        "unfreeze": TopLevels(OPEN),
    }
    if ceiling:
        trainer = TransferTrainer(model, arguments, train_dataset=train, eval_dataset=test, **options)
    else:
        kind, rates = DomainAlignmentTrainer, {}
        if "discrepancy" not in setting:
            kind, rates = DomainAdversarialTrainer, {"critic_learning_rate": 1e-3}
        pairs = DomainPairs(train, reviews(data, target, labelled=False), seed=seed)
        options |= {"eval_dataset": validation, "oracle_dataset": test, **rates, **setting}
        trainer = kind(model, arguments, train_dataset=pairs, **options)
    trainer.train()
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps([entry for entry in trainer.state.log_history if "eval_accuracy" in str(entry)]))


def accuracies(runs: list[list[dict[str, Any]]], off: list[dict[str, Any]]) -> dict[str, float]:
    """Test accuracy of one method on one pair and seed, by way of choosing: over settings and steps."""

    def chosen(runs: list[list[dict[str, Any]]]) -> dict[str, float]:
        together = [{**entry, "step": (number, entry["step"])} for number, run in enumerate(runs) for entry in run]
        ways = selections(together, metric="accuracy", greater_is_better=True)
        return {way: ways[way]["target_accuracy"] for way in ways}

    last = max(runs[0], key=lambda entry: (entry["step"], "eval_oracle_accuracy" in entry))
    or_off = {f"{way} or off": accuracy for way, accuracy in chosen([*runs, off]).items()}
    return {"last": last["eval_oracle_accuracy"], **chosen(runs), **or_off}


def report(out: Path, pairs: list[tuple[str, str]], seeds: list[int]) -> str:
    """The table of the methods of which every run is there."""

    def read(pair: tuple[str, str], name: str, seed: int) -> list[dict[str, Any]]:
        return json.loads((out / "-".join(pair) / f"{name}-{seed}.json").read_text())

    def over_seeds(values: list[float]) -> str:
        return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"

    ways = ("last", "source", "source or off", "honest", "honest or off", "oracle")
    (off,) = METHODS["source only"]
    lines = ["| method | settings | " + " | ".join(ways) + " |", "|---|---:|" + "---:|" * len(ways)]
    for method, settings in METHODS.items():
        done = [
            setting
            for setting in settings
            if all((out / "-".join(p) / f"{name_of(setting)}-{s}.json").exists() for p, s in product(pairs, seeds))
        ]
        if not done:
            lines.append(f"| {method} | not finished |")
            continue
        found = {
            seed: [
                accuracies([read(pair, name_of(setting), seed) for setting in done], read(pair, name_of(off), seed))
                for pair in pairs
            ]
            for seed in seeds
        }
        cells = [over_seeds([mean(each[way] for each in found[seed]) for seed in seeds]) for way in ways]
        lines.append(f"| {method} | {len(done)} | " + " | ".join(cells) + " |")
    targets = {target: (source, target) for source, target in pairs}
    if all((out / "-".join(pair) / f"ceiling-{seed}.json").exists() for pair in targets.values() for seed in seeds):
        scores = [
            mean(read(targets[target], "ceiling", seed)[-1]["eval_accuracy"] for _, target in pairs) for seed in seeds
        ]
        lines.append(f"| trained on the target's labels | 1 | {over_seeds(scores)} |" + " |" * (len(ways) - 1))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["-".join(pair) for pair in permutations(DOMAINS, 2)]
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/amazon"))
    parser.add_argument("--pairs", nargs="+", choices=every, default=every, metavar="SOURCE-TARGET")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes; they share one GPU where there is one")
    parser.add_argument("--report", action="store_true", help="print the table of what is finished, train nothing")
    options = parser.parse_args()
    pairs = [tuple(pair.split("-")) for pair in options.pairs]
    seeds = list(range(options.seeds))
    targets = {target: (source, target) for source, target in pairs}.values()
    first, second = (
        [
            (pair, settings[number], seed)
            for seed, settings, pair in product(seeds, METHODS.values(), pairs)
            if number < len(settings)
        ]
        for number in range(2)
    )
    jobs = [*first, *((pair, CEILING, seed) for pair, seed in product(targets, seeds)), *second]
    if not options.report:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(run, options.data, options.out, *pair, *rest) for pair, *rest in jobs]
            for job in waiting:
                job.result()
    print(report(options.out, pairs, seeds))


if __name__ == "__main__":
    main()
