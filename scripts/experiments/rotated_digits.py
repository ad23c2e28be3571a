"""Domain adaptation small enough to see all of it: digits learned upright, wanted turned by 25 degrees.

    python scripts/experiments/rotated_digits.py [--out out/rotated_digits] [--seeds 5]

scikit-learn's 1,797 digits of 8 x 8 (Alpaydin & Kaynak 1998) are cut, anew for each seed, into thirds: labelled ones,
others turned by 25 degrees without labels, and turned ones to test on. A small MLP takes 1,500 steps of 64 pairs at a
constant rate of 1e-3. Every method has three settings, the usual one in the middle; the scores without target labels
(hf_transfer.scores, on 100 upright digits held out and the turned ones trained on) choose one setting of each method,
and one of all, seed by seed; the oracle chooses by test labels. Finished runs are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import DomainAdversarialTrainer, DomainAlignmentTrainer, DomainPairs, TransferTrainer
from hf_transfer.tasks import single_label_scores
from hf_transfer.training.label_free import CRITERIA

DEGREES, STEPS, BATCH, HELD_OUT = 25, 1500, 64, 100
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "source only": [{"discrepancy": "mmd", "weight": 0.0}],
    "DANN": [{"strength": 0.3}, {}, {"strength": 2.0}],
    "CDAN": [{"conditional": True, "strength": 0.3}, {"conditional": True}, {"conditional": True, "strength": 2.0}],
    "MMD": [{"discrepancy": "mmd", "weight": weight} for weight in (0.3, 1.0, 3.0)],
    "joint MMD": [{"discrepancy": "joint_mmd", "weight": weight} for weight in (0.3, 1.0, 3.0)],
    "CORAL": [{"discrepancy": "coral", "weight": weight} for weight in (0.1, 1.0, 10.0)],
}


class MLPConfig(PreTrainedConfig):
    model_type = "mlp"


class MLPForImageClassification(PreTrainedModel):
    """64 pixels, two hidden layers, ten digits."""

    config_class = MLPConfig
    main_input_name = "pixel_values"
    loss_type = "ForImageClassification"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.classifier = nn.Linear(64, 10)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial weights."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.body(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def read_domains(seed: int) -> dict[str, Dataset]:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    upright, turned, test = np.split(order, [len(order) // 3, 2 * len(order) // 3])

    def rows(indices: np.ndarray, degrees: int) -> Dataset:
        images = [rotate(digits.images[index] / 16, degrees, reshape=False, order=1).ravel() for index in indices]
        columns = {"pixel_values": np.array(images, dtype=np.float32), "labels": digits.target[indices]}
        return Dataset.from_dict(columns).with_format("torch")

    return {
        "source": rows(upright[HELD_OUT:], 0),
        "validation": rows(upright[:HELD_OUT], 0),
        "target": rows(turned, DEGREES),
        "test": rows(test, DEGREES),
    }


def run(folder: Path, setting: dict[str, Any] | None, seed: int) -> dict[str, float]:
    """The scores of one run; without a setting, of training on the target's labels."""
    name = "ceiling" if setting is None else "-".join(f"{key}={value}" for key, value in setting.items()) or "default"
    done = folder / f"{name}-{seed}.json"
    if not done.exists():
        domains = read_domains(seed)
        torch.manual_seed(seed)
        model = MLPForImageClassification(MLPConfig(num_labels=10))
        arguments = TrainingArguments(
            str(folder / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=256,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        options: dict[str, Any] = {
            "data_collator": default_data_collator,
            "eval_dataset": domains["validation"],
            "compute_metrics": lambda found: single_label_scores(found.predictions, found.label_ids),
        }
        if setting is None:
            trainer = TransferTrainer(model, arguments, train_dataset=domains["target"], **options)
        else:
            kind = DomainAlignmentTrainer if "discrepancy" in setting else DomainAdversarialTrainer
            pairs = DomainPairs(domains["source"], domains["target"])
            trainer = kind(model, arguments, train_dataset=pairs, **setting, **options)
        trainer.train()
        scores = trainer.evaluate() | trainer.evaluate(domains["test"], metric_key_prefix="test")
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(scores))
    return json.loads(done.read_text())


def choose(scores: list[dict[str, float]], criterion: str) -> float:
    """Test accuracy of the run that ``criterion`` prefers."""
    pick = max if CRITERIA[criterion] else min
    return pick(scores, key=lambda each: each[f"eval_{criterion}"])["test_accuracy"]


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/rotated_digits"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    runs = {
        method: [[run(options.out, setting, seed) for setting in settings] for seed in seeds]
        for method, settings in SETTINGS.items()
    }
    ceiling = [run(options.out, None, seed)["test_accuracy"] for seed in seeds]
    runs["any of them"] = [sum((runs[method][seed] for method in SETTINGS), []) for seed in seeds]
    ways = list(CRITERIA)
    print("| method | default | " + " | ".join(ways) + " | oracle |\n|---|" + "---:|" * (len(ways) + 2))
    for method, by_seed in runs.items():
        middle = len(by_seed[0]) // 2  # the usual one stands in the middle
        cells = [spread([scores[middle]["test_accuracy"] for scores in by_seed]) if method in SETTINGS else ""]
        cells += [spread([choose(scores, criterion) for scores in by_seed]) for criterion in ways]
        cells += [spread([max(each["test_accuracy"] for each in scores) for scores in by_seed])]
        print(f"| {method} | " + " | ".join(cells) + " |")
    print(f"\nTrained on the target's labels: {spread(ceiling)}")


if __name__ == "__main__":
    main()
