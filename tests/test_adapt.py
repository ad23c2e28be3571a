"""Recipes of domain adaptation, from files to the run folder."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_transfer.errors import ConfigurationError
from hf_transfer.recipe import Recipe
from tests.folders import sentiment_rows, write_decoder, write_encoder, write_rows


@pytest.fixture
def values(tmp_path):
    source = write_rows(tmp_path / "books.jsonl", sentiment_rows(32))
    target = write_rows(tmp_path / "kitchen.jsonl", [{"text": row["text"]} for row in sentiment_rows(20, start=100)])
    test = write_rows(tmp_path / "kitchen_test.jsonl", sentiment_rows(10, start=500))
    return {
        "recipe": "domain_adversarial",
        "model": {"name": str(write_encoder(tmp_path / "model"))},
        "data": {
            "source": {"path": "json", "data_files": str(source), "validation": 0.25},
            "target": {"path": "json", "data_files": {"train": str(target), "test": str(test)}},
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
    }


def changed(values, **changes):
    return {**values, **changes, "data": {**values["data"], **changes.get("data", {})}}


METHODS = {
    "dann": ({"strength": "ramp"}, "domain_adversarial_loss"),
    "cdan": ({"conditional": True, "strength": {"ramp": {"gamma": 5}}}, "conditional_adversarial_accuracy"),
    "mmd": ({"recipe": "domain_alignment", "pooling": ["mean", "cls"]}, "mmd_loss"),
    "jan": ({"recipe": "domain_alignment", "discrepancy": "joint_mmd", "weight": "ramp"}, "joint_mmd_loss"),
    "coral": ({"recipe": "domain_alignment", "discrepancy": "coral", "bandwidth": "median"}, "coral_loss"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_adapts_and_leaves_an_ordinary_model(method, values):
    changes, logged = METHODS[method]
    recipe = Recipe.from_values(changed(values, **changes))
    assert Recipe.from_values(recipe.values()) == recipe
    result = recipe.run()
    assert {"accuracy", "loss"} <= result.metrics["validation"].keys()
    assert "accuracy" in result.metrics["test"]
    log = json.loads((result.folder / "log_history.json").read_text())
    assert any(logged in entry for entry in log)
    assert len([entry for entry in log if "loss" in entry]) == 6  # 24 source texts, two epochs of three batches
    model = AutoModelForSequenceClassification.from_pretrained(result.folder)
    assert not any("critic" in name for name in load_file(result.folder / "model.safetensors"))
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_labels_of_the_target_change_nothing(values, tmp_path):
    labelled = [{**row, "label": "nobody reads this"} for row in sentiment_rows(20, start=100)]
    write_rows(tmp_path / "kitchen_labelled.jsonl", labelled)
    runs = []
    for name in ("kitchen", "kitchen_labelled"):
        target = {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl")}
        training = {**values["training"], "output_dir": str(tmp_path / f"run-{name}")}
        runs.append(Recipe.from_values(changed(values, data={"target": target}, training=training)).run())
    assert "test" not in runs[0].metrics
    one, other = (load_file(each.folder / "model.safetensors") for each in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_result_shows_source_honest_and_oracle(values, tmp_path):
    training = {**values["training"], "eval_strategy": "epoch"}
    result = Recipe.from_values(changed(values, training=training, criterion="target_entropy")).run()
    selection = json.loads((result.folder / "metrics.json").read_text())["selection"]
    assert list(selection) == ["source", "honest", "oracle"]
    assert all({"step", "source_accuracy", "target_accuracy"} == each.keys() for each in selection.values())
    assert selection["oracle"]["target_accuracy"] == max(each["target_accuracy"] for each in selection.values())
    target = {"path": "json", "data_files": str(tmp_path / "kitchen.jsonl")}
    blind = {**training, "output_dir": str(tmp_path / "blind")}
    result = Recipe.from_values(changed(values, training=blind, data={"target": target})).run()
    assert list(result.metrics["selection"]) == ["source", "honest"]


def test_with_lora_and_unfreezing(values):
    result = Recipe.from_values(
        changed(values, adapter={"method": "lora", "target_modules": ["query"]}, unfreeze={"until": 0.5})
    ).run()
    base = AutoModelForSequenceClassification.from_pretrained(values["model"]["name"], num_labels=2)
    adapted = PeftModel.from_pretrained(base, result.folder)
    trained = [value for name, value in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(value.any() for value in trained)  # they start at zero


def test_a_language_model_reads_two_domains(values, tmp_path):
    model = {"name": str(write_decoder(tmp_path / "decoder")), "task": "causal-lm"}
    result = Recipe.from_values(changed(values, recipe="domain_alignment", model=model, fused_loss=True)).run()
    assert {"perplexity"} <= result.metrics["validation"].keys() & result.metrics["test"].keys()


REFUSED = {
    "no target": (lambda values: {"source": values["data"]["source"]}, "data.target is missing"),
    "another section": (
        lambda values: {**values["data"], "targt": {}},
        "data.targt.*Did you mean 'target'",
    ),
    "one section of data": (lambda values: {"path": "json"}, "data.source is missing"),
    "unlabelled source": (
        lambda values: {**values["data"], "source": {**values["data"]["source"], "unlabelled": "more"}},
        "data.source.unlabelled: what has no labels is data.target",
    ),
    "few of a target": (
        lambda values: {**values["data"], "target": {**values["data"]["target"], "train_size": 4}},
        "data.target.train_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_in_the_data_is_named(name, values):
    make, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_values({**values, "data": make(values)})


def test_a_second_term_of_two_domains_and_its_refusal_where_there_is_one(values):
    objectives = {"coral": {"weight": 0.1}, "l2sp": {}}
    result = Recipe.from_values(changed(values, objectives=objectives)).run()
    assert "coral_loss" in (result.folder / "log_history.json").read_text()
    one = {**values, "recipe": "lora", "data": values["data"]["source"], "objectives": objectives}
    with pytest.raises(ConfigurationError, match=r"objectives.coral: it compares two domains, .* 'lora' has one"):
        Recipe.from_values(one)


def test_domains_without_a_shared_label_space(values, tmp_path):
    strange = [{**row, "label": "maybe"} for row in sentiment_rows(10, start=500)]
    files = {"train": str(tmp_path / "kitchen.jsonl"), "test": str(write_rows(tmp_path / "strange.jsonl", strange))}
    recipe = Recipe.from_values(changed(values, data={"target": {"path": "json", "data_files": files}}))
    with pytest.raises(ConfigurationError, match="maybe"):
        recipe.build()
