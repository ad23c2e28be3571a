"""What a teacher adds to a student of half its blocks: SST-2 and TREC-6, 2,000 labelled examples, three seeds.

    python scripts/experiments/distillation.py --data DATA [--out out/distillation] [--sets trec sst2]

DATA is laid out as few_shot.py says. The teacher is MiniLM (6 blocks), fine-tuned on the labelled examples; every
student starts as three of the teacher's blocks, sees the same labelled examples, and takes the same number of steps.
All is chosen once, on 300 validation examples of the first set with the first seed, from four values or pairs for each
arm, is used everywhere, and reported on 500 test examples: for the teacher and the student alone the learning rate,
which the other students share; for the distilled one alpha and temperature, which the last two share; for hidden
states their weight. The unlabelled texts are 6,000 (TREC: what is left) of the same pool, without their labels.
Finished runs are read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from few_shot import splits_of

from hf_transfer import Recipe
from hf_transfer.schema import merge

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELLED, UNLABELLED, STEPS, LAYERS = 2000, 6000, 300, 3
RATES = {"training.learning_rate": [3e-5, 1e-4, 3e-4, 1e-3]}


def write_files(name: str, data: Path, folder: Path) -> dict[str, str]:
    splits = splits_of(name, data)
    pool = splits.pop("train")
    splits |= {"train": pool[:LABELLED], "unlabelled": pool[LABELLED : LABELLED + UNLABELLED]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str((folder / f"{split}.jsonl").resolve()) for split in splits}


class Experiment:
    """One data set: its files, and a folder for each arm. ``choices`` has what was chosen, and gets what is."""

    def __init__(
        self, name: str, data: Path, out: Path, *, steps: int, seeds: int, choices: dict[str, dict[str, Any]]
    ) -> None:
        self.folder = out / name
        self.files = write_files(name, data, self.folder / "data")
        self.steps, self.seeds, self.choices = steps, list(range(seeds)), choices

    def run(
        self,
        arm: str,
        model: dict[str, Any],
        settings: dict[str, Any],
        search: dict[str, list[float]] | None = None,
        **options: Any,
    ) -> list[float]:
        """The scores of one arm over the seeds; what is to be searched and is not yet chosen is chosen here."""
        folder = self.folder / arm.replace(" ", "-")
        if arm in self.choices:
            settings = merge(settings, self.choices[arm])
        elif search is not None:
            settings = {**settings, "search": search}
        values = {
            "recipe": "compare",
            "model": model,
            "data": {"path": "json", "data_files": self.files, "max_length": 48},
            "training": {
                "output_dir": str(folder),
                "max_steps": self.steps,
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 64,
                "warmup_steps": 0.1,
                "save_strategy": "no",
                "logging_steps": 50,
            },
            "arms": {arm: settings},
            "seeds": self.seeds,
            **options,
        }
        (found,) = Recipe.from_values(values).run(resume=folder.exists()).metrics["arms"]
        if search is not None:
            self.choices.setdefault(arm, found["chosen"])
        return found["scores"]

    def arms(self) -> dict[str, list[float]]:
        """Test accuracy of every arm, seed by seed."""
        scores = {}
        settings = {"recipe": "fine_tune"}
        scores["teacher, 6 blocks"] = self.run(
            "teacher", {"name": MODEL}, settings, RATES, seeds=[0], keep_models=True
        )
        folder = str(self.folder / "teacher/teacher/seed-0")
        student = {"name": folder, "layers": LAYERS}
        scores["student alone"] = self.run("alone", student, settings, RATES)

        rate = self.choices["alone"]["training.learning_rate"]
        taught = {"recipe": "distillation", "teacher": {"name": folder}, "training": {"learning_rate": rate}}
        search = {"alpha": [0.5, 0.9], "temperature": [2.0, 4.0]}
        scores["distilled"] = self.run("distilled", student, taught, search)

        taught |= self.choices["distilled"]
        hidden = {"hidden_state_matching": {"layers": "uniform"}}
        search = {"objectives.hidden_state_matching.weight": [0.1, 0.3, 1.0, 3.0]}
        matched = {**taught, "objectives": hidden}
        scores["distilled, hidden states too"] = self.run("hidden states", student, matched, search)
        more = {**taught, "data": {"unlabelled": "unlabelled"}}
        scores["distilled, unlabelled texts too"] = self.run("unlabelled", student, more)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/distillation"))
    parser.add_argument("--sets", nargs="+", default=["trec", "sst2"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    alike: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds, "choices": {}}
    results = {name: Experiment(name, options.data, options.out, **alike).arms() for name in options.sets}
    print("\nTest accuracy, mean and standard deviation over the seeds, and its share of the teacher's:\n")
    print("| | " + " | ".join(results) + " |\n|---|" + "---:|" * len(results))
    for arm in next(iter(results.values())):
        cells = []
        for scores in results.values():
            (teacher,) = scores["teacher, 6 blocks"]
            spread = f" ± {stdev(scores[arm]):.3f}" if len(scores[arm]) > 1 else ""
            cells.append(f"{mean(scores[arm]):.3f}{spread} ({mean(scores[arm]) / teacher:.1%})")
        print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
