"""A language model of a third of its teacher's blocks: what the teacher adds at equal steps, there or stored.

    python scripts/experiments/distilled_language_model.py --data DATA [--out out/distilled_language_model]

DATA holds models/stories3M-int8dq (a 3.1M-parameter Llama trained on TinyStories, 6 blocks) and
corpora/tinystories_5k.jsonl.gz (karpathy/tinystories-gpt4-clean), of which 1,000 stories train, 200 choose and 200
report; the teacher has probably seen them all, the student sees the first. The student is two of the teacher's blocks
under its embeddings and head. The learning rate is chosen for the student alone and shared; alpha and T are chosen for
the online teacher and shared by the stored ones, which have the most probable 64 tokens with their tail, or 12 draws
per token. Three seeds, each another order of the same blocks. Finished runs are read.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import (
    DataSpec,
    DistillationTrainer,
    ModelSpec,
    TeacherStore,
    TransferTrainer,
    load_tokenizer,
    load_trained,
    student_from,
)
from hf_transfer.tasks import bits_per_character, find_task

STEPS, BATCH, BLOCK, LAYERS, TRAINED_ON = 100, 8, 256, 2, 1000
RATES = (3e-4, 1e-3, 3e-3)
SETTINGS = tuple(itertools.product((0.5, 1.0), (1.0, 2.0)))  # alpha, T


def read_texts(data: Path) -> dict[str, Dataset]:
    with gzip.open(data / "corpora/tinystories_5k.jsonl.gz", "rt", encoding="utf-8") as file:
        stories = [json.loads(line)["text"] for line in file]
    cuts = {"train": stories[:TRAINED_ON], "validation": stories[-400:-200], "test": stories[-200:]}
    return {name: Dataset.from_dict({"text": texts}) for name, texts in cuts.items()}


class Experiment:
    """The texts, the teacher and what is stored of it, made once for every run."""

    def __init__(self, data: Path, out: Path, *, steps: int) -> None:
        self.out, self.steps = out, steps
        spec = ModelSpec(str(data / "models/stories3M-int8dq"), task="causal-lm")
        self.tokenizer = load_tokenizer(spec)
        self.teacher = load_trained(spec)
        section = DataSpec(path="text", block_size=BLOCK)
        self.data = section.prepare(read_texts(data), self.tokenizer, task="causal-lm")

    def run(self, arm: str, seed: int, rate: float, alpha: float = 0.0, temperature: float = 1.0) -> dict[str, float]:
        """Perplexity and bits per character on validation and test text."""
        done = self.out / f"{arm}-{self.steps}-{seed}-{rate:g}-{alpha:g}-{temperature:g}.json"
        if not done.exists():
            trainer = self._trainer(arm, seed, rate, alpha, temperature)
            trainer.train()
            scores = self._scores(trainer)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(scores))
            print(f"{done.stem}: {scores}", file=sys.stderr, flush=True)
        return json.loads(done.read_text())

    def of_the_teacher(self) -> dict[str, float]:
        return self._scores(TransferTrainer(self.teacher, self._arguments(0, 1e-3), **self._options()))

    def _trainer(self, arm: str, seed: int, rate: float, alpha: float, temperature: float) -> TransferTrainer:
        student = student_from(self.teacher, layers=LAYERS)
        student.requires_grad_(True)
        arguments, options = self._arguments(seed, rate), self._options()
        if arm == "alone":
            return TransferTrainer(student, arguments, fused_loss=True, **options)
        teacher = self.teacher if arm == "online" else self._store(arm, temperature)
        return DistillationTrainer(
            student,
            arguments,
            teacher=teacher,
            alpha=alpha,
            temperature=temperature,
            compare_to_teacher=False,
            **options,
        )

    def _store(self, form: Any, temperature: float) -> TeacherStore:
        return TeacherStore.build(
            self.teacher,
            self.data.train,
            self.data.collator,
            directory=self.out / f"store-{form}-{temperature:g}",
            form=form,
            temperature=temperature if form == "samples" else 1.0,
        )

    def _arguments(self, seed: int, rate: float) -> TrainingArguments:
        return TrainingArguments(
            str(self.out / "trainer"),
            max_steps=self.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.0,
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )

    def _options(self) -> dict[str, Any]:
        task = find_task("causal-lm")
        return {
            "train_dataset": self.data.train,
            "data_collator": self.data.collator,
            "compute_metrics": task.metrics(None, []).compute,
            "preprocess_logits_for_metrics": task.preprocess_logits_for_metrics,
        }

    def _scores(self, trainer: TransferTrainer) -> dict[str, float]:
        scores = {}
        for name, rows in (("validation", self.data.validation), ("test", self.data.test)):
            perplexity = trainer.evaluate(rows)["eval_perplexity"]
            scores[f"{name}_perplexity"] = perplexity
            characters = self.data.summaries[name].characters_per_token
            scores[name] = bits_per_character(perplexity, characters_per_token=characters)
        return scores


def row(name: str, chosen: str, scores: list[dict[str, float]]) -> str:
    cells = []
    for key, digits in (("test_perplexity", 2), ("test", 3)):
        values = [each[key] for each in scores]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}")
    return f"| {name} | {chosen} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/distilled_language_model"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    experiment = Experiment(options.data, options.out, steps=options.steps)
    seeds = range(options.seeds)

    rate = min(RATES, key=lambda each: experiment.run("alone", 0, each)["validation"])
    alpha, temperature = min(SETTINGS, key=lambda each: experiment.run("online", 0, rate, *each)["validation"])
    teacher, student = experiment.teacher, student_from(experiment.teacher, layers=LAYERS)
    print(f"teacher {teacher.num_parameters():,} parameters, student {student.num_parameters():,}\n")
    print("| arm | chosen | test ppl | test bits/char |\n|---|---|---:|---:|")
    print(row("teacher", "", [experiment.of_the_teacher()]))
    print(row("student alone", f"rate {rate:g}", [experiment.run("alone", seed, rate) for seed in seeds]))
    named = {"online": "distilled", "top_k": "from a stored top 64", "samples": "from 12 stored draws"}
    for arm, name in named.items():
        scores = [experiment.run(arm, seed, rate, alpha, temperature) for seed in seeds]
        print(row(name, f"alpha {alpha:g}, T {temperature:g}", scores), flush=True)


if __name__ == "__main__":
    main()
