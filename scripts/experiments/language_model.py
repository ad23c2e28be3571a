"""A small language model adapted to another domain: what it learns there, and what it forgets.

    python scripts/experiments/language_model.py --data DATA [--model FOLDER] [--out out/language_model] [--seeds 3]

DATA holds models/stories260K (a 260K-parameter Llama trained on TinyStories; karpathy/tinyllamas on the Hub),
corpora/tinystories_5k.jsonl.gz (source; karpathy/tinystories-gpt4-clean) and corpora/tinyshakespeare.txt.gz (target;
karpathy/char-rnn). Shakespeare is cut in three stretches: 80 % to train, 10 % to choose each arm's learning rate, 10 %
to report. Every arm gets the same number of steps and the same search. Finished runs are read, not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import L2SP, DataSpec, GradualUnfreeze, ModelSpec, TransferTrainer, load_model, load_tokenizer
from hf_transfer.tasks import bits_per_character, find_task

STEPS, BATCH, BLOCK = 150, 8, 256
RATES = {"from scratch": (1e-3, 3e-3, 1e-2), "LoRA r=16": (1e-3, 3e-3, 1e-2)}
DEFAULT_RATES = (3e-4, 1e-3, 3e-3)
ARMS = {
    "from scratch": {},
    "full fine-tuning": {},
    "+ gradual unfreezing": {"unfreeze": lambda: GradualUnfreeze(until=0.5)},
    "+ L2-SP 0.1": {"objectives": lambda: [L2SP(weight=0.1)]},
    "+ L2-SP 1.0": {"objectives": lambda: [L2SP(weight=1.0)]},
    "LoRA r=16": {},
}


def read_texts(data: Path) -> dict[str, Dataset]:
    """Shakespeare's three stretches and the last stories, one document per row."""
    with gzip.open(data / "corpora/tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        paragraphs = file.read().split("\n\n")
    with gzip.open(data / "corpora/tinystories_5k.jsonl.gz", "rt", encoding="utf-8") as file:
        stories = [json.loads(line)["text"] for line in file][-200:]
    first, second = int(0.8 * len(paragraphs)), int(0.9 * len(paragraphs))
    stretches = {"train": paragraphs[:first], "validation": paragraphs[first:second], "test": paragraphs[second:]}
    return {name: Dataset.from_dict({"text": texts}) for name, texts in {**stretches, "source": stories}.items()}


class Experiment:
    """The texts, tokenised once for every run."""

    def __init__(self, model: str, data: Path, out: Path) -> None:
        self.out = out
        self.spec = ModelSpec(name=model, task="causal-lm")
        self.tokenizer = load_tokenizer(self.spec)
        section = DataSpec(path="text", block_size=BLOCK)
        texts = read_texts(data)
        source = texts.pop("source")
        self.target = section.prepare(texts, self.tokenizer, task="causal-lm")
        self.source = section.prepare({"train": source}, self.tokenizer, task="causal-lm")

    def run(self, arm: str, rate: float, seed: int) -> dict[str, float]:
        """Bits per character on the target's validation and test text and on the source, after training."""
        done = self.out / f"{arm.replace(' ', '_')}-{rate:g}-{seed}.json"
        if not done.exists():
            scores = self._train(arm, rate, seed)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(scores))
        return json.loads(done.read_text())

    def before(self) -> dict[str, float]:
        return self._score(self._trainer(load_model(self.spec, tokenizer=self.tokenizer), 1e-3, 0))

    def _train(self, arm: str, rate: float, seed: int) -> dict[str, float]:
        spec = ModelSpec(name=self.spec.name, task="causal-lm", pretrained=arm != "from scratch")
        model = load_model(spec, tokenizer=self.tokenizer, seed=seed)
        if arm.startswith("LoRA"):
            set_seed(seed)
            config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            model = get_peft_model(model, config)
        options = {name: value() if callable(value) else value for name, value in ARMS[arm].items()}
        trainer = self._trainer(model, rate, seed, **options)
        trainer.train()
        return self._score(trainer)

    def _trainer(self, model, rate: float, seed: int, **options) -> TransferTrainer:
        arguments = TrainingArguments(
            str(self.out / "trainer"),
            max_steps=STEPS,
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
        task = find_task("causal-lm")
        return TransferTrainer(
            model,
            arguments,
            train_dataset=self.target.train,
            data_collator=self.target.collator,
            compute_metrics=task.metrics(None, []).compute,
            preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
            **options,
        )

    def _score(self, trainer: TransferTrainer) -> dict[str, float]:
        scores = {}
        for name, rows, summary in (
            ("validation", self.target.validation, self.target.summaries["validation"]),
            ("test", self.target.test, self.target.summaries["test"]),
            ("source", self.source.train, self.source.summaries["train"]),
        ):
            perplexity = trainer.evaluate(rows)["eval_perplexity"]
            scores[name] = bits_per_character(perplexity, characters_per_token=summary.characters_per_token)
            scores[f"{name}_perplexity"] = perplexity
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("out/language_model"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = Experiment(options.model or str(options.data / "models/stories260K"), options.data, options.out)

    before = experiment.before()
    print("| arm | learning rate | target ppl | target bits/char | source ppl | source bits/char |")
    print("|---|---|---|---|---|---|")
    print(
        f"| before | | {before['test_perplexity']:.2f} | {before['test']:.3f} "
        f"| {before['source_perplexity']:.2f} | {before['source']:.3f} |",
        flush=True,
    )
    for arm in ARMS:
        rates = RATES.get(arm, DEFAULT_RATES)
        rate = min(rates, key=lambda rate: experiment.run(arm, rate, 0)["validation"])
        runs = [experiment.run(arm, rate, seed) for seed in range(options.seeds)]
        cells = [
            f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"
            for key, digits in (("test_perplexity", 2), ("test", 3), ("source_perplexity", 2), ("source", 3))
            if (values := [run[key] for run in runs])
        ]
        print(f"| {arm} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
