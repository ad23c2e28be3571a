"""Every recipe that ships builds its trainer, with a tiny model and tiny data in place of the real ones."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_transfer.compare import CompareRecipe
from hf_transfer.distill import DistillationRecipe
from hf_transfer.recipe import RECIPES, Recipe, TrainingRecipe
from hf_transfer.schema import merge
from tests.folders import sentiment_rows, write_classifier, write_decoder, write_encoder, write_rows
from tests.media import write_images, write_sounds, write_vit, write_wav2vec2

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "recipes").rglob("*.yaml"))


MODELS = {
    "causal-lm": write_decoder,
    "image-classification": write_vit,
    "audio-classification": write_wav2vec2,
}
FOLDERS = {
    "image-classification": ("imagefolder", write_images),
    "audio-classification": ("audiofolder", write_sounds),
}


def tiny(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe on a tiny model and on local files that have the columns it names."""
    task = values["model"].get("task")
    is_language_model = task == "causal-lm"
    model = MODELS.get(task, write_encoder)(folder / "model")
    taught = {}
    if "teacher" in values:
        write_teacher = write_decoder if is_language_model else write_classifier
        taught["teacher"] = {"name": str(write_teacher(folder / "teacher"))}
    if "store" in values:
        taught["store"] = {"directory": str(folder / "store")}
    layers = {"layers": 2} if "layers" in values["model"] else {}
    data = tiny_data(values["data"], folder, task) if "path" in values["data"] else {}
    for domain in ("source", "target"):
        if domain in values["data"]:
            data[domain] = tiny_data(values["data"][domain], folder / domain, task)
    return merge(
        values,
        {
            **taught,
            "model": {"name": str(model), **layers},
            "data": data,
            "training": {"output_dir": str(folder / "run"), "use_cpu": True},
        },
    )


def tiny_data(values: dict[str, Any], folder: Path, task: str) -> dict[str, Any]:
    """A section of data that reads local files."""
    if task in FOLDERS:
        path, write = FOLDERS[task]
        return {"path": path, "data_dir": str(write(folder))}
    folder.mkdir(exist_ok=True)
    columns = {"text": "text", "label": "label", **values.get("columns", {})}
    sizes = {"train": values.get("train_size", 16), "validation": 8, "test": 8}
    files = {}
    for place, (split, size) in enumerate(sizes.items()):
        rows = [{columns[role]: row[role] for role in row} for row in sentiment_rows(size, start=10_000 * place)]
        files[split] = str(write_rows(folder / f"{split}.jsonl", rows))
    lengths = {name: 32 for name in ("max_length", "block_size") if name in values}
    return {"path": "json", "name": None, "data_files": files, **lengths}


def test_there_is_one_for_every_kind_of_recipe() -> None:
    assert {yaml.safe_load(path.read_text())["recipe"] for path in PATHS} == set(RECIPES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_checked_as_it_stands(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.from_values(recipe.values()) == recipe


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_builds(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_values(tiny(yaml.safe_load(path.read_text()), tmp_path))
    runs = [recipe]
    if isinstance(recipe, CompareRecipe):
        runs = [recipe.recipe(arm, seed=recipe.seeds[0]) for arm in recipe.arms]
    for run in runs:
        assert isinstance(run, TrainingRecipe)
        if isinstance(run, DistillationRecipe) and run.store is not None:
            run.teach()
        assert run.build().plan()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_head_says_how_to_launch_it_and_every_override_there_works(path: Path) -> None:
    comment = [line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")]
    launches = [shlex.split(line, comments=True) for line in comment if f"run recipes/{path.name}" in line]
    assert launches
    for words in launches:
        Recipe.load(path, [word for word in words if "=" in word])
