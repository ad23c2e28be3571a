"""Recipes: what they refuse before a model is loaded, what they train, and what they leave behind."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Config, T5ForConditionalGeneration

from hf_transfer.errors import ConfigurationError
from hf_transfer.recipe import FineTuneRecipe, GradualUnfreezeRecipe, LoraRecipe, Recipe
from hf_transfer.report import RunFolder
from hf_transfer.schedules import GradualUnfreeze, SlantedTriangular, TopLevels
from hf_transfer.schema import merge
from tests.folders import (
    sentiment_rows,
    write_decoder,
    write_encoder,
    write_rows,
    write_sentiment,
    write_tokenizer,
)
from tests.tiny import VOCABULARY


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An encoder, a decoder, and sentiment data on disk."""
    root = tmp_path_factory.mktemp("material")
    return {
        "encoder": str(write_encoder(root / "encoder")),
        "decoder": str(write_decoder(root / "decoder")),
        "files": write_sentiment(root / "data"),
    }


@pytest.fixture
def values(material: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A small recipe; with ``LONG`` it learns its task."""
    return {
        "recipe": "fine_tune",
        "model": {"name": material["encoder"]},
        "data": {"path": "json", "data_files": material["files"]},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
    }


LONG = {"training.num_train_epochs": 12}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


# ---- loading ----


def test_a_yaml_file_becomes_the_class_it_names(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "recipe": "gradual_unfreeze", "unfreeze": {"until": 0.5}}))
    recipe = Recipe.load(path, ["training.learning_rate=1e-4", "learning_rate_schedule=slanted_triangular"])
    assert isinstance(recipe, GradualUnfreezeRecipe)
    assert recipe.unfreeze == GradualUnfreeze(until=0.5)
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.learning_rate_schedule == SlantedTriangular()


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("recipe: lora\ntraining:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigurationError, match=r"'seed' is given twice.*line 3"):
        Recipe.load(path)


def test_resolved_values_are_a_recipe_again(values: dict[str, Any]) -> None:
    options = {
        "adapter": {"method": "lora", "r": 2, "target_modules": ["query"]},
        "unfreeze": {"blocks": 1},
        "bands": {"head": 0.1},
        "objectives": {"l2sp": {"weight": {"ramp": {"gamma": 3}}}},
        "learning_rate_schedule": "slanted_triangular",
    }
    recipe = Recipe.from_values({**values, **options})
    again = Recipe.from_values(yaml.safe_load(yaml.safe_dump(recipe.values())))
    assert again == recipe
    assert again.values() == recipe.values()


def test_python_and_yaml_are_checked_alike(values: dict[str, Any]) -> None:
    sections = {name: values[name] for name in ("model", "data", "training")}
    assert FineTuneRecipe(**sections) == Recipe.from_values(values)
    with pytest.raises(ConfigurationError, match="unfreeze.untill"):
        FineTuneRecipe(**sections, unfreeze={"untill": 1})  # type: ignore[arg-type]


def test_a_named_class_takes_its_own_recipes_only(values: dict[str, Any]) -> None:
    del values["recipe"]
    assert isinstance(LoraRecipe.from_values(values), LoraRecipe)
    with pytest.raises(ConfigurationError, match="recipe is missing"):
        Recipe.from_values(values)
    with pytest.raises(ConfigurationError, match="expected one that is a LoraRecipe"):
        LoraRecipe.from_values({**values, "recipe": "fine_tune"})


def test_the_lora_recipe_fills_in_what_is_not_said(values: dict[str, Any]) -> None:
    recipe = LoraRecipe.from_values({**values, "recipe": "lora", "adapter": {"r": 2}})
    assert recipe.adapter == {"method": "lora", "target_modules": "all-linear", "r": 2}


# ---- refusals ----

REFUSED = {
    "recipe": ({"recipe": "fine_tun"}, r"recipe = 'fine_tun'.*Did you mean 'fine_tune'"),
    "section": ({"trainig": {}}, r"trainig = \{\}.*Did you mean 'training'"),
    "model key": ({"model.nam": "x"}, r"model.nam = 'x'.*Did you mean 'name'"),
    "model task": ({"model.task": "sequence-clasification"}, r"model.task.*Did you mean 'sequence-classification'"),
    "type": ({"data.train_size": "many"}, r"data.train_size = 'many': expected a whole number"),
    "training key": ({"training.lerning_rate": 1}, r"training.lerning_rate = 1.*Did you mean 'learning_rate'"),
    "renamed": ({"training.evaluation_strategy": "epoch"}, r"It is now 'eval_strategy'"),
    "renamed to another": ({"training.no_cuda": True}, r"It is now 'use_cpu'"),
    "training value": ({"training.lr_scheduler_type": "cosin"}, r"training.lr_scheduler_type.*Did you mean 'cosine'"),
    "token": ({"training.hub_token": "secret"}, r"training.hub_token.*HF_TOKEN"),
    "no folder": ({"training.output_dir": None}, r"training.output_dir is missing"),
    "arguments": (
        {"training": {"load_best_model_at_end": True, "eval_strategy": "epoch"}},
        r"training: --load_best_model_at_end requires",
    ),
    "no validation": ({"data.validation": 0, "training.eval_strategy": "epoch"}, r"training.eval_strategy = 'epoch'"),
    "model": ({"model.name": "no/such/folder"}, r"model.name = 'no/such/folder'"),
    "file": ({"data.data_files": {"train": "nowhere.jsonl"}}, r"data.data_files.*nowhere.jsonl"),
    "column": ({"data.columns": {"text": "txt"}}, r"no column 'txt'.*Did you mean 'text'"),
    "two schedules": (
        {"learning_rate_schedule": "ramp", "training.warmup_steps": 3},
        r"training.warmup_steps and learning_rate_schedule",
    ),
    "no adapter at all": ({"recipe": "lora", "adapter": None}, r"adapter = None"),
    "no schedule at all": ({"recipe": "gradual_unfreeze", "unfreeze": None}, r"unfreeze = None"),
    "recipe of another type": ({"recipe": ["lora"]}, r"recipe = \['lora'\]"),
    "adapter method of another type": ({"adapter": {"method": 3}}, r"adapter.method = 3"),
    "rates": ({"bands": {}, "layer_decay": 0.9}, r"layer_decay and bands"),
    "rate": ({"base_ratio": 2}, r"base_ratio must be in"),
    "quantised": ({"model.quantization": "8bit"}, r"model.quantization = '8bit'.*Add an adapter"),
    "adapter on pooling": (
        {"model.pooling": "mean", "adapter": {}},
        r"model.pooling = 'mean'.*not saved with an adapter",
    ),
    "adapter on a random base": ({"model.pretrained": False, "adapter": {}}, r"nobody could make again"),
    "merging nothing": ({"merge_adapter": True}, r"merge_adapter: there is no adapter"),
    "merging a prompt": (
        {"merge_adapter": True, "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 2}},
        r"merge_adapter: prompt_tuning",
    ),
    "adapter on features": (
        {"recipe": "feature_extraction", "adapter": {}},
        r"adapter = \{\}: there is no such option",
    ),
    "features of a language model": (
        {"recipe": "feature_extraction", "model.task": "causal-lm"},
        r"model.task = 'causal-lm' has no new head",
    ),
    "cache": ({"frozen_prefix_cache": "x"}, r"frozen_prefix_cache.*without 'unfreeze'"),
    "deepspeed": ({"unfreeze": {}, "training.deepspeed": {"a": 1}}, r"unfreeze: DeepSpeed"),
    "adapter method": ({"adapter": {"method": "lorra"}}, r"adapter.method = 'lorra'.*Did you mean 'lora'"),
    "adapter key": ({"adapter": {"rr": 8}}, r"adapter.rr = 8"),
    "adapter value": ({"adapter": {"r": "big"}}, r"adapter.r = 'big': expected a whole number"),
    "adapter of PEFT": ({"adapter": {"layers_pattern": "h"}}, r"adapter: .*layers_to_transform"),
    "objective": ({"objectives": {"l2ps": {}}}, r"objectives.l2ps.*Did you mean 'l2sp'"),
    "objective key": ({"objectives": {"l2sp": {"wait": 1}}}, r"objectives.l2sp.wait = 1.*Did you mean 'weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(case: str, values: dict[str, Any], tmp_path: Path) -> None:
    """The folder of the model has no weights: whoever tries to load it fails with another message."""
    hollow = shutil.copytree(values["model"]["name"], tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    changes, message = REFUSED[case]
    values = merge(merge(values, {"model.name": str(hollow)}), changes)
    with pytest.raises(ConfigurationError, match=message) as caught:
        Recipe.from_values(values).build()
    assert "\n" not in str(caught.value)


def test_the_case_above_would_notice_a_loaded_model(values: dict[str, Any], tmp_path: Path) -> None:
    hollow = shutil.copytree(values["model"]["name"], tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="model.safetensors"):
        Recipe.from_values(merge(values, {"model.name": str(hollow)})).build()


def test_every_wrong_key_is_named_at_once(values: dict[str, Any]) -> None:
    wrong = merge(values, {"model.nam": 1, "training.sede": 1, "objectives": {"l2ps": {}}, "adapter": {"rr": 1}})
    with pytest.raises(ConfigurationError) as caught:
        Recipe.from_values(wrong)
    assert [line.split(" ")[0].rstrip(":") for line in str(caught.value).splitlines()] == [
        "model.nam",
        "training.sede",
        "objectives.l2ps",
        "adapter.rr",
    ]


def test_schedules_are_refused_where_the_launch_fixes_the_parameters(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    Recipe.from_values({**values, "recipe": "gradual_unfreeze"})
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigurationError, match="FSDP version 1"):
        Recipe.from_values({**values, "recipe": "gradual_unfreeze"})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a file that can be read.*Did you mean 'recipe.yaml'"), ("a: [", "not YAML"), ("- a", "no mapping")],
)
def test_files_that_are_no_recipes(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content or "")
    with pytest.raises(ConfigurationError, match=message):
        Recipe.load(tmp_path / ("recip.yaml" if content is None else "recipe.yaml"))


# ---- what is built ----


def test_options_reach_the_trainer(values: dict[str, Any]) -> None:
    options = {
        "unfreeze": {"blocks": 1},
        "layer_decay": 0.5,
        "learning_rate_schedule": "slanted_triangular",
        "objectives": {"l2sp": {"weight": 0.3}},
        "task_weight": 0.7,
    }
    trainer = Recipe.from_values({**values, **options}).build()
    assert trainer.unfreeze == TopLevels(1)
    assert trainer.learning_rate_schedule == SlantedTriangular()
    assert [row.learning_rate for row in trainer.plan()] == [1e-2 * 0.5**level for level in range(5)]
    assert trainer.objectives[0].weight == 0.3
    assert trainer.task_weight == 0.7


def test_from_scratch_starts_from_random_weights(values: dict[str, Any]) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    pretrained = Recipe.from_values(values).build().model.state_dict()[name]
    scratch = Recipe.from_values(merge(values, {"model.pretrained": False})).build().model.state_dict()[name]
    stored = load_file(Path(values["model"]["name"], "model.safetensors"))[name.removeprefix("bert.")]
    torch.testing.assert_close(pretrained, stored)
    assert (scratch - stored).abs().max() > 1e-3


def test_the_seed_decides_new_weights(values: dict[str, Any]) -> None:
    before = itertools.count()

    def new_weights(seed: int, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(next(before))  # what ran before must not matter
        model = Recipe.from_values(merge({**values, **options}, {"training.seed": seed})).build().model
        return [value for name, value in model.named_parameters() if "classifier" in name or "lora_A" in name]

    for options in ({}, {"recipe": "lora"}):
        first, same, other = new_weights(0, **options), new_weights(0, **options), new_weights(1, **options)
        for one, two in zip(first, same, strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "r": 2, "target_modules": "all-linear"},
        {"method": "ia3", "target_modules": ["query"], "feedforward_modules": []},
        {"method": "ln_tuning", "target_modules": ["LayerNorm"]},
        {"method": "prompt_tuning", "num_virtual_tokens": 2},
    ],
    ids=lambda adapter: adapter["method"],
)
def test_any_peft_method_trains_its_adapter_and_the_head(adapter: dict[str, Any], values: dict[str, Any]) -> None:
    model = Recipe.from_values({**values, "adapter": adapter}).build().model
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in training)
    assert any("classifier" not in name for name in training)
    assert not any(name.endswith("word_embeddings.weight") for name in training)


def test_a_head_that_peft_does_not_know_by_name_is_trained_and_saved(values: dict[str, Any], tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    model = Recipe.from_values(merge(values, {"recipe": "lora", "model.name": str(tmp_path / "t5")})).build().model
    heads = {name: parameter for name, parameter in model.named_parameters() if "classification_head" in name}
    trained = [name for name, parameter in heads.items() if parameter.requires_grad]
    assert trained
    assert all("modules_to_save" in name for name in trained)


def test_best_checkpoints_are_chosen_by_the_tasks_own_metric(values: dict[str, Any]) -> None:
    keep = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = Recipe.from_values(merge(values, {"training": keep})).build()
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("accuracy", True)
    named = {**keep, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = Recipe.from_values(merge(values, {"training": named})).build()
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)


# ---- what is left behind ----


def test_a_run_leaves_a_model_that_transformers_loads_alone(
    values: dict[str, Any], material: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = Recipe.from_values(merge(values, LONG)).run()
    assert result.metrics == read(result.folder, "metrics.json")
    assert result.metrics["test"]["accuracy"] == 1.0
    assert result.metrics["metric"] == {"name": "accuracy", "greater_is_better": True}

    model = AutoModelForSequenceClassification.from_pretrained(result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    rows = [json.loads(line) for line in Path(material["files"]["test"]).read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    predicted = model(**batch).logits.argmax(-1).tolist()
    assert [model.config.id2label[index] for index in predicted] == [row["label"] for row in rows]

    run = read(result.folder, "run.json")
    assert (run["seed"], run["processes"], run["labels"], run["finished"]) == (42, 1, ["no", "yes"], True)
    assert run["versions"]["torch"] == torch.__version__
    assert any("train_loss" in entry for entry in read(result.folder, "log_history.json"))
    plan = (result.folder / "plan.txt").read_text()
    assert "bert.encoder.layer.0" in plan
    printed = capsys.readouterr().out
    assert "fine_tune: 1 process on cpu" in printed
    assert printed.count(plan.strip()) == 1
    assert "test: " in printed


def test_an_adapter_run_is_loaded_by_plain_peft(values: dict[str, Any], material: dict[str, Any]) -> None:
    recipe = Recipe.from_values(merge({**values, "recipe": "lora", "adapter": {"r": 4}}, LONG))
    result = recipe.run()
    assert result.metrics["test"]["accuracy"] == 1.0
    model = AutoPeftModelForSequenceClassification.from_pretrained(result.folder, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    rows = [json.loads(line) for line in Path(material["files"]["test"]).read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert model(**batch).logits.argmax(-1).tolist() == [["no", "yes"].index(row["label"]) for row in rows]
    assert not (result.folder / "model.safetensors").exists()


def test_an_adapter_keeps_the_pooler_that_its_base_lacks(values: dict[str, Any], tmp_path: Path) -> None:
    """A masked language model's checkpoint has no pooler: a new one is trained and saved, or a reload would guess."""
    base = shutil.copytree(values["model"]["name"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "pooler" not in name}, base / "model.safetensors")
    recipe = Recipe.from_values(merge(values, {"recipe": "lora", "model.name": str(base), "training.seed": 5}))
    trainer = recipe.build()
    trainer.train()
    trainer.save_model()
    torch.manual_seed(99)
    reloaded = AutoPeftModelForSequenceClassification.from_pretrained(trainer.args.output_dir, num_labels=2).eval()
    tokens = torch.tensor([[2, 5, 7, 3]])
    torch.testing.assert_close(reloaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_merged_adapter_is_an_ordinary_model_that_predicts_the_same(values: dict[str, Any]) -> None:
    """With mean pooling, which changes the base and hence could not be kept otherwise."""
    recipe = {"recipe": "lora", "adapter": {"r": 4}, "merge_adapter": True, "model.pooling": "mean"}
    result = Recipe.from_values(merge(values, recipe)).run()
    model = AutoModelForSequenceClassification.from_pretrained(result.folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    again = Recipe.from_values(merge(values, {"model.name": str(result.folder), "training.learning_rate": 0.0}))
    again.training["output_dir"] += "-again"
    assert again.run().metrics["test"]["loss"] == pytest.approx(result.metrics["test"]["loss"], abs=1e-5)


def test_the_resolved_recipe_reruns_to_the_same_weights(values: dict[str, Any], tmp_path: Path) -> None:
    first = Recipe.from_values({**values, "recipe": "gradual_unfreeze", "layer_decay": 0.9}).run()
    again = Recipe.load(first.folder / "recipe.yaml", [f"training.output_dir={tmp_path / 'again'}"]).run()
    one, two = (load_file(folder / "model.safetensors") for folder in (first.folder, again.folder))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_feature_extraction_leaves_the_base_and_an_ordinary_model(values: dict[str, Any]) -> None:
    recipe = {"recipe": "feature_extraction", "features_dtype": "float32"}
    result = Recipe.from_values({**values, **recipe}).run()
    assert result.metrics["trainable_parameters"] == 2 * 16 + 2
    before = load_file(Path(values["model"]["name"], "model.safetensors"))
    after = load_file(result.folder / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, after[f"bert.{name}"]), name
    AutoModelForSequenceClassification.from_pretrained(result.folder)
    assert (result.folder / "plan.txt").read_text().count("classifier") == 1


def test_gradual_unfreezing_counts_what_really_trains(values: dict[str, Any]) -> None:
    two_levels = {"recipe": "gradual_unfreeze", "training": {**values["training"], "num_train_epochs": 2}}
    result = Recipe.from_values({**values, **two_levels}).run()
    model = AutoModelForSequenceClassification.from_pretrained(result.folder)
    opened = ("classifier.", "bert.pooler.", "bert.encoder.layer.2.")
    expected = sum(value.numel() for name, value in model.named_parameters() if name.startswith(opened))
    assert result.metrics["trainable_parameters"] == expected
    closed = "encoder.layer.1.output.dense.weight"
    before = load_file(Path(values["model"]["name"], "model.safetensors"))[closed]
    assert torch.equal(before, load_file(result.folder / "model.safetensors")[f"bert.{closed}"])


def test_an_interrupted_run_is_resumed_from_its_last_whole_checkpoint(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values(merge(values, {"training.save_strategy": "epoch"}))
    folder = recipe.run().folder
    straight = load_file(folder / "model.safetensors")

    run = RunFolder(folder)
    run.write("run.json", {**run.read("run.json"), "finished": False})
    for name in ("model.safetensors", "metrics.json", "checkpoint-16/trainer_state.json"):
        (folder / name).unlink()
    assert run.last_checkpoint() == folder / "checkpoint-12"
    shutil.rmtree(folder / "checkpoint-4")

    with pytest.raises(ConfigurationError, match="not empty"):
        recipe.run()
    recipe.run(resume=True)
    assert not (folder / "checkpoint-4").exists(), "it began anew"
    after = load_file(folder / "model.safetensors")
    for name in straight:
        assert torch.equal(straight[name], after[name]), name


def test_a_used_folder_is_refused_before_a_model_is_loaded(values: dict[str, Any], tmp_path: Path) -> None:
    hollow = shutil.copytree(values["model"]["name"], tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    used = tmp_path / "run"
    used.mkdir()
    (used / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match="not empty"):
        Recipe.from_values(merge(values, {"model.name": str(hollow)})).run()


def test_a_finished_run_is_read_and_not_repeated(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values(merge(values, {"training.num_train_epochs": 1}))
    first = recipe.run()
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = recipe.run(resume=True)
    assert again == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_refused_run_deletes_nothing(values: dict[str, Any]) -> None:
    folder = Recipe.from_values(merge(values, {"training.num_train_epochs": 1})).run().folder
    broken = Recipe.from_values(merge(values, {"data.columns": {"text": "txt"}}))
    with pytest.raises(ConfigurationError, match="txt"):
        broken.run(overwrite=True)
    assert (folder / "model.safetensors").exists()


def test_the_test_split_can_be_kept_for_later(values: dict[str, Any]) -> None:
    result = Recipe.from_values(merge(values, {"training.num_train_epochs": 1})).run(score=["validation"])
    assert "validation" in result.metrics
    assert "test" not in result.metrics
    assert not any("test_loss" in entry for entry in read(result.folder, "log_history.json"))


def test_no_secret_of_the_environment_is_written(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    folder = Recipe.from_values(merge(values, {"training.num_train_epochs": 1})).run().folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"verysecret" in path.read_bytes()]


# ---- other tasks ----


def test_tags(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"tokens": row["text"].split(), "tags": ["O", "B-thing", "O", "O", "O"]} for row in sentiment_rows(24)]
    data = {"path": "json", "data_files": str(write_rows(tmp_path / "tags.jsonl", rows)), "validation": 0.25}
    result = Recipe.from_values({**merge(values, {"model.task": "token-classification"}), "data": data}).run()
    assert result.metrics["metric"]["name"] == "f1"
    assert result.metrics["validation"]["f1"] == 1.0
    assert "test" not in result.metrics


def test_language_model(values: dict[str, Any], material: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(row["text"] for row in sentiment_rows(64)))
    data = {"path": "text", "data_files": str(tmp_path / "text.txt"), "packing": False}
    model = {"name": material["decoder"], "task": "causal-lm"}
    untouched = copy.deepcopy(values)
    untouched["training"] |= {"learning_rate": 0.0, "output_dir": str(tmp_path / "untouched")}
    before = Recipe.from_values({**untouched, "model": model, "data": data}).run()
    after = Recipe.from_values({**values, "recipe": "lora", "model": model, "data": data}).run()
    assert after.metrics["metric"] == {"name": "perplexity", "greater_is_better": False}
    assert after.metrics["validation"]["perplexity"] < 0.9 * before.metrics["validation"]["perplexity"]
