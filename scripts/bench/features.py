"""What a linear head on a frozen base costs: by plain Trainer, by sentence-transformers and scikit-learn, and by us.

    python scripts/bench/features.py --data FOLDER [--model NAME] [--examples 2000] [--trainer-epochs 1] [--rounds 3]

FOLDER holds sst2/train_phrases.jsonl.gz and sst2/test.jsonl, jsonl with "text" and "label": the phrases and the test
sentences of SST-2 (GLUE; Socher et al. 2013). Phrases of more than 8 words are trained on. Every head reads the mean
of all tokens. CPU seconds of the process at one thread; sentence-transformers and "ours, cold" tokenise in that time,
the others start from tokens. Rounds alternate everything but the Trainer, which runs once, scaled to 10 epochs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import extract_features
from hf_transfer.checkpoints import resolve
from hf_transfer.heads import add_mean_pooling, fit_head

EPOCHS, BATCH = 10, 32


class MeanPooled(nn.Module):
    """A frozen base, the mean of its tokens and a linear head, as one writes it for plain Trainer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.base = AutoModel.from_pretrained(name).requires_grad_(False)
        self.head = nn.Linear(self.base.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **rest: Any) -> dict:
        states = self.base(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Bench:
    """The data, and one method per way to train a head on it: CPU seconds and the accuracy on the test sentences."""

    def __init__(self, name: str, data: Path, examples: int, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        phrases = read(data / "sst2" / "train_phrases.jsonl.gz").filter(lambda row: len(row["text"].split()) > 8)
        self.train = phrases.shuffle(seed=0).select(range(examples)).flatten_indices()
        self.test = read(data / "sst2" / "test.jsonl")
        self.labels, self.test_labels = (torch.tensor(rows["label"][:]) for rows in (self.train, self.test))
        self.train_tokens, self.test_tokens = self.tokenise(self.train), self.tokenise(self.test)
        self.model = add_mean_pooling(AutoModelForSequenceClassification.from_pretrained(name, num_labels=2))
        self.base = AutoModel.from_pretrained(name).eval()
        self.encoder = SentenceTransformer(name, device="cpu")
        self.test_features: Tensor | None = None

    def tokenise(self, rows: Dataset) -> Dataset:
        return Dataset.from_dict({**self.tokenizer(rows["text"][:], truncation=True), "labels": rows["label"][:]})

    def trainer(self, epochs: int) -> tuple[float, float]:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(self.folder / "trainer"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            num_train_epochs=epochs,
            learning_rate=1e-2,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(MeanPooled(self.name), arguments, self.collator, self.train_tokens)
        spent = seconds(trainer.train)
        found = torch.from_numpy(trainer.predict(self.test_tokens).predictions).argmax(1)
        return spent / epochs * EPOCHS, self.accuracy(found)

    def sentence_transformers(self) -> tuple[float, float]:
        head = LogisticRegression(max_iter=1000)
        spent = seconds(lambda: head.fit(self.encoder.encode(self.train["text"][:]), self.labels))
        return spent, self.accuracy(torch.from_numpy(head.predict(self.encoder.encode(self.test["text"][:]))))

    def ours(self, cache: str) -> tuple[float, float]:
        cold = cache not in {path.name for path in self.folder.iterdir()}

        def run() -> None:
            rows = self.tokenise(self.train) if cold else self.train_tokens
            fit_head(self.model, self.features(rows, cache), self.labels)

        spent = seconds(run)
        if self.test_features is None:
            self.test_features = self.features(self.test_tokens, "test").float()
        return spent, self.accuracy(self.model.classifier(self.test_features).argmax(1))

    def features(self, rows: Dataset, cache: str) -> Tensor:
        return extract_features(self.model, rows, data_collator=self.collator, cache_dir=self.folder / cache)

    def one_pass(self, *, bfloat16: bool) -> tuple[float, None]:
        """The base alone over sorted, ready batches: what nobody can go below."""
        rows = self.train_tokens.remove_columns("labels")
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        batches = [self.collator(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)]

        def run() -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                for batch in batches:
                    self.base(**batch)

        return seconds(run), None

    def accuracy(self, found: Tensor) -> float:
        return float((found == self.test_labels).float().mean())


def read(path: Path) -> Dataset:
    return load_dataset("json", data_files=str(path), split="train")


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--trainer-epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        bench = Bench(resolve(options.model), options.data, options.examples, Path(folder))
        rounds = []
        for number in range(options.rounds):
            rounds.append(
                {
                    "one pass, float32": bench.one_pass(bfloat16=False),
                    "one pass, bfloat16": bench.one_pass(bfloat16=True),
                    "sentence-transformers + scikit-learn": bench.sentence_transformers(),
                    "ours, cold": bench.ours(f"round {number}"),
                    "ours, second run": bench.ours(f"round {number}"),
                }
            )
        trainer = bench.trainer(options.trainer_epochs)
    times = {name: statistics.median(row[name][0] for row in rounds) for name in rounds[0]}
    accuracies = {name: row[1] for name, row in rounds[0].items()}
    plain = f"plain Trainer, {EPOCHS} epochs"
    times[plain], accuracies[plain] = trainer
    tokens = sum(map(len, bench.train_tokens["input_ids"]))
    print(f"{options.examples} texts, {tokens} tokens; medians of {options.rounds} rounds")
    print(f"the Trainer ran {options.trainer_epochs} epochs: accuracy after these, time scaled to {EPOCHS}")
    print(f"{'':<40}{'CPU s':>9}{'accuracy':>10}")
    for name, spent in times.items():
        print(f"{name:<40}{spent:>9.2f}" + ("" if accuracies[name] is None else f"{accuracies[name]:>10.3f}"))
    print(f"\n{'':<67}{'ratio':>8}{'goal':>8}")
    for name, beside, goal in (
        ("ours, cold", plain, 0.03),
        ("ours, cold", "sentence-transformers + scikit-learn", 0.6),
        ("ours, cold", "one pass, bfloat16", 1.3),
        ("ours, cold", "one pass, float32", 1.3),
        ("ours, second run", plain, 0.001),
    ):
        ratio = statistics.median(row[name][0] / row.get(beside, trainer)[0] for row in rounds)
        print(f"{name + ' / ' + beside:<67}{ratio:>8.4f}{goal:>8}")


if __name__ == "__main__":
    main()
