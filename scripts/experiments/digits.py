"""Domain adaptation small enough to see all of it: digits turned by 25 degrees, MNIST to USPS and back.

    python scripts/experiments/digits.py --shift rotated [--out out/digits] [--seeds 5]
    python scripts/experiments/digits.py --shift mnist-usps usps-mnist --data DATA [--seeds 3] [--workers 2]

rotated: scikit-learn's 1,797 digits of 8 x 8 (Alpaydin & Kaynak 1998) are cut, anew for each seed, into thirds:
labelled ones, others turned by 25 degrees without labels, and turned ones to test on; 100 upright ones are held out. A
small MLP takes 1,500 steps of 64 pairs at a constant rate of 1e-3.

mnist-usps and usps-mnist: DATA holds mnist/mnist.npz (20,000 digits of LeCun et al. 1998, and their test set) and
usps/usps.npz (Hull 1994). All of a domain's training digits, 28 x 28; 1,000 test digits of the source are held out. A
ResNet of three basic blocks (78,394 parameters) takes 1,000 steps of 32 pairs from scratch, at 1e-3 with a cosine.

Every method has three settings, the usual one in the middle; the scores without target labels (hf_transfer.scores, of
the held-out source digits and the target digits trained on) choose one setting of each method, and one of all, seed by
seed; the oracle chooses by test labels. "two forwards" is DANN as a plain PyTorch loop writes it: a forward pass of
each domain, the same critic, rates, ramp and number of steps. Finished runs are read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    default_data_collator,
)
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer import DomainAdversarialTrainer, DomainAlignmentTrainer, DomainPairs, TransferTrainer
from hf_transfer.adversarial import reverse_gradient
from hf_transfer.tasks import single_label_scores
from hf_transfer.training.label_free import CRITERIA

DEGREES, HELD_OUT, RATE = 25, 100, 1e-3
SOURCE_ONLY, CEILING, TWO_FORWARDS = "source only", "trained on the target's labels", "DANN, two forwards"
SETTINGS: dict[str, list[dict[str, Any]]] = {
    SOURCE_ONLY: [{}],
    "DANN": [{"strength": 0.3}, {}, {"strength": 2.0}],
    "CDAN": [{"conditional": True, "strength": 0.3}, {"conditional": True}, {"conditional": True, "strength": 2.0}],
    "MMD": [{"discrepancy": "mmd", "weight": weight} for weight in (0.3, 1.0, 3.0)],
    "joint MMD": [{"discrepancy": "joint_mmd", "weight": weight} for weight in (0.3, 1.0, 3.0)],
    "CORAL": [{"discrepancy": "coral", "weight": weight} for weight in (0.1, 1.0, 10.0)],
}


Rows = list[dict[str, Any]]


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

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.body(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def small_resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", num_labels=10, **sizes))


def examples(images: np.ndarray | Tensor, labels: np.ndarray) -> Rows:
    pixels = torch.as_tensor(images)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


def turned(data: Path | None, seed: int) -> dict[str, Rows]:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    upright, turned, test = np.split(order, [len(order) // 3, 2 * len(order) // 3])

    def rows(indices: np.ndarray, degrees: int) -> Rows:
        images = [rotate(digits.images[index] / 16, degrees, reshape=False, order=1).ravel() for index in indices]
        return examples(np.array(images, dtype=np.float32), digits.target[indices])

    return {
        "source": rows(upright[HELD_OUT:], 0),
        "validation": rows(upright[:HELD_OUT], 0),
        "target": rows(turned, DEGREES),
        "test": rows(test, DEGREES),
    }


def written(source: str, target: str, data: Path | None, seed: int) -> dict[str, Rows]:
    assert data is not None, "--data is needed"

    def rows(name: str, split: str, count: int | None = None) -> Rows:
        with np.load(data / name / f"{name}.npz") as file:
            images, labels = file[f"{split}_images"][:count], file[f"{split}_labels"][:count]
        pixels = torch.from_numpy(images).float()[:, None] / 127.5 - 1
        return examples(functional.interpolate(pixels, size=(28, 28), mode="bilinear", antialias=True), labels)

    return {
        "source": rows(source, "train"),
        "validation": rows(source, "test", 1000),
        "target": rows(target, "train"),
        "test": rows(target, "test"),
    }


@dataclass(frozen=True)
class Shift:
    """Two domains, and how a model is trained on them."""

    read: Callable[[Path | None, int], dict[str, Rows]]
    model: Callable[[], Any]
    features: Callable[[Any, Tensor], Tensor]
    steps: int
    batch: int
    schedule: str
    warmup: int


MNIST = {
    "model": small_resnet,
    "features": lambda model, pixels: model.resnet(pixels).pooler_output.flatten(1),
    "steps": 1000,
    "batch": 32,
    "schedule": "cosine",
    "warmup": 50,
}
SHIFTS = {
    "rotated": Shift(
        read=turned,
        model=lambda: MLPForImageClassification(MLPConfig(num_labels=10)),
        features=lambda model, pixels: model.body(pixels),
        steps=1500,
        batch=64,
        schedule="constant",
        warmup=0,
    ),
    "mnist-usps": Shift(read=partial(written, "mnist", "usps"), **MNIST),
    "usps-mnist": Shift(read=partial(written, "usps", "mnist"), **MNIST),
}


def two_forwards(shift: Shift, model: Any, domains: dict[str, Rows], seed: int) -> None:
    """DANN without a library."""
    generator = torch.Generator().manual_seed(seed)

    def endless(rows: Rows) -> Iterator[dict[str, Any]]:
        while True:
            yield from DataLoader(rows, shift.batch, shuffle=True, drop_last=True, generator=generator)

    batches = [endless(domains[name]) for name in ("source", "target")]
    width = shift.features(model.eval(), domains["source"][0]["pixel_values"][None]).shape[1]
    critic = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    parameters = [*model.train().parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        if shift.schedule == "constant":
            return 1.0
        if step < shift.warmup:
            return step / shift.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - shift.warmup) / (shift.steps - shift.warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(shift.steps):
        strength = 2 / (1 + math.exp(-10 * step / shift.steps)) - 1
        loss = torch.zeros(())
        for domain, rows in enumerate(batches):
            batch = next(rows)
            features = shift.features(model, batch["pixel_values"])
            if domain == 0:
                loss = loss + functional.cross_entropy(model.classifier(features), batch["labels"])
            guess = critic(reverse_gradient(features, strength))
            loss = loss + functional.cross_entropy(guess, torch.full((len(guess),), domain)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def name_of(method: str, setting: dict[str, Any]) -> str:
    return "-".join([method.replace(" ", "_"), *(f"{key}={value}" for key, value in setting.items())])


def run(shift_name: str, method: str, setting: dict[str, Any], seed: int, data: Path | None, out: Path) -> None:
    """Note the scores of one run."""
    done = out / shift_name / f"{name_of(method, setting)}-{seed}.json"
    if done.exists():
        return
    torch.set_num_threads(1)
    shift = SHIFTS[shift_name]
    domains = shift.read(data, seed)
    torch.manual_seed(seed)
    model = shift.model()
    arguments = TrainingArguments(
        str(out / "trainer" / str(os.getpid())),
        max_steps=shift.steps,
        per_device_train_batch_size=shift.batch,
        per_device_eval_batch_size=256,
        learning_rate=RATE,
        lr_scheduler_type=shift.schedule,
        warmup_steps=shift.warmup,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    options: dict[str, Any] = {
        "data_collator": default_data_collator,
        "eval_dataset": domains["validation"],
        "compute_metrics": lambda found: single_label_scores(found.predictions, found.label_ids),
    }
    pairs = DomainPairs(domains["source"], domains["target"])
    if method in (SOURCE_ONLY, CEILING):
        rows = domains["source" if method == SOURCE_ONLY else "target"]
        TransferTrainer(model, arguments, train_dataset=rows, **options).train()
    elif method == TWO_FORWARDS:
        two_forwards(shift, model, domains, seed)
    adapts = bool(setting) or method in ("DANN", "CDAN")
    if adapts and "discrepancy" not in setting:
        trainer = DomainAdversarialTrainer(model, arguments, train_dataset=pairs, **setting, **options)
    else:
        trainer = DomainAlignmentTrainer(model, arguments, train_dataset=pairs, **setting, **options)
    if adapts:
        trainer.train()
    scores = trainer.evaluate() | trainer.evaluate(domains["test"], metric_key_prefix="test")
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(scores))


def report(shift: str, seeds: int, out: Path) -> str:
    def read(method: str, setting: dict[str, Any], seed: int) -> dict[str, float]:
        return json.loads((out / shift / f"{name_of(method, setting)}-{seed}.json").read_text())

    def chosen(scores: list[dict[str, float]], criterion: str) -> float:
        pick = max if CRITERIA[criterion] else min
        return pick(scores, key=lambda each: each[f"eval_{criterion}"])["test_accuracy"]

    def spread(values: list[float]) -> str:
        return f"{mean(values):.3f} ± {stdev(values):.3f}"

    runs = {
        method: [[read(method, setting, seed) for setting in settings] for seed in range(seeds)]
        for method, settings in SETTINGS.items()
    }
    runs["any of them"] = [sum((runs[method][seed] for method in SETTINGS), []) for seed in range(seeds)]
    ways = list(CRITERIA)
    lines = ["| method | default | " + " | ".join(ways) + " | oracle |", "|---|" + "---:|" * (len(ways) + 2)]
    for method, by_seed in runs.items():
        middle = len(by_seed[0]) // 2  # the usual one stands in the middle
        cells = [spread([scores[middle]["test_accuracy"] for scores in by_seed]) if method in SETTINGS else ""]
        cells += [spread([chosen(scores, criterion) for scores in by_seed]) for criterion in ways]
        cells += [spread([max(each["test_accuracy"] for each in scores) for scores in by_seed])]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method in (TWO_FORWARDS, CEILING):
        lines.append(f"| {method} | {spread([read(method, {}, seed)['test_accuracy'] for seed in range(seeds)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shift", nargs="+", choices=SHIFTS, default=["rotated"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    arms = {**SETTINGS, CEILING: [{}], TWO_FORWARDS: [{}]}
    jobs = [
        (shift, method, setting, seed)
        for seed in range(options.seeds)
        for shift in options.shift
        for method, settings in arms.items()
        for setting in settings
    ]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for waiting in [pool.submit(run, *job, options.data, options.out) for job in jobs]:
            waiting.result()
    for shift in options.shift:
        print(f"\n{shift}\n\n{report(shift, options.seeds, options.out)}")


if __name__ == "__main__":
    main()
