"""Comparisons: what is run, what is reused, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_transfer.compare import ArmResult, CompareRecipe, Comparison
from hf_transfer.errors import ConfigurationError
from hf_transfer.recipe import FineTuneRecipe, LoraRecipe, Recipe
from hf_transfer.schema import merge
from tests.folders import write_encoder, write_sentiment


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {
        "recipe": "compare",
        "model": {"name": str(write_encoder(tmp_path / "encoder"))},
        "data": {"path": "json", "data_files": write_sentiment(tmp_path / "data"), "train_size": 24},
        "training": {
            "output_dir": str(tmp_path / "comparison"),
            "num_train_epochs": 12,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
        "arms": {
            "untrained": {"recipe": "fine_tune", "training.learning_rate": 0.0, "training.num_train_epochs": 1},
            "Fine tuning": {"recipe": "fine_tune"},
        },
        "seeds": [0, 1],
        "keep_models": True,
    }


def comparison(scores: dict[str, list[float]], **options: Any) -> Comparison:
    arms = [
        ArmResult(name=name, scores=each, trainable_parameters=1000, seconds=1.0, chosen={})
        for name, each in scores.items()
    ]
    seeds = list(range(len(arms[0].scores)))
    return Comparison(
        **{"metric": "macro_f1", "greater_is_better": True, "split": "test", "seeds": seeds, "arms": arms} | options
    )


def test_a_difference_beyond_the_spread_is_called_one() -> None:
    verdict = comparison({"a": [0.5, 0.6], "b": [0.9, 0.92], "c": [0.1, 0.1]}).verdict()
    assert verdict == (
        "b has the best test macro f1, 0.910 ± 0.014. It is 0.360 better than a (0.550 ± 0.071): more than the spread "
        "of the seeds (0.071). c comes last with 0.100 ± 0.000."
    )


def test_a_difference_within_the_spread_is_not() -> None:
    verdict = comparison({"a": [0.5, 0.7], "b": [0.6, 0.64]}).verdict()
    assert "0.020 better than a (0.600 ± 0.141): within the spread of the seeds (0.141)" in verdict
    assert "do not tell the two apart" in verdict


def test_one_seed_shows_no_spread() -> None:
    assert "one seed shows no spread" in comparison({"a": [0.5], "b": [0.9]}).verdict()


def test_where_less_is_better_the_least_wins() -> None:
    results = comparison({"a": [9.0, 9.2], "b": [3.0, 3.1]}, metric="perplexity", greater_is_better=False)
    assert results.verdict().startswith("b has the best test perplexity")
    assert [line.split(" | ")[0] for line in results.table().splitlines()[2:4]] == ["| b", "| a"]


def test_arms_override_what_is_common(values: dict[str, Any]) -> None:
    values["arms"]["LoRA"] = {"recipe": "lora", "adapter": {"r": 2}, "training": {"learning_rate": 0.1}}
    recipe = Recipe.from_values(values)
    assert isinstance(recipe, CompareRecipe)
    lora = recipe.recipe("LoRA", seed=1)
    assert isinstance(lora, LoraRecipe)
    assert (lora.training["learning_rate"], lora.training["num_train_epochs"]) == (0.1, 12)
    assert (lora.training["seed"], lora.data.seed) == (1, 1)
    assert Path(lora.training["output_dir"]) == Path(values["training"]["output_dir"], "lora", "seed-1")
    assert isinstance(recipe.recipe("Fine tuning", seed=0), FineTuneRecipe)
    assert Recipe.from_values(recipe.values()) == recipe


def test_a_data_seed_that_is_set_stays(values: dict[str, Any]) -> None:
    recipe = CompareRecipe.from_values(merge(values, {"data.seed": 5}))
    assert [recipe.recipe("untrained", seed=seed).data.seed for seed in (0, 1)] == [5, 5]


def test_all_that_is_wrong_with_the_arms_is_said_at_once(values: dict[str, Any]) -> None:
    wrong = {"training.sede": 1, "arms.a": {"recipe": "lora", "adapter": {"rr": 1}}, "arms.b": {"recipe": "lorra"}}
    with pytest.raises(ConfigurationError) as caught:
        Recipe.from_values(merge({**values, "arms": {}}, wrong))
    assert [line.partition(" = ")[0] for line in str(caught.value).splitlines()] == [
        "arms.a: training.sede",
        "arms.a: adapter.rr",
        "arms.b: recipe",
    ]


def test_what_is_wrong_with_all_arms_is_said_once(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Recipe.from_values(merge(values, {"model.nam": 1}))
    assert str(caught.value) == "model.nam = 1: there is no such option. Did you mean 'name'?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"seeds = \[\]"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\].*all different"),
        ({"arms": {"A b": {}, "a-b": {}}}, "arms = .*all different"),
        ({"arms.untrained.search": {"training.seed": 3}}, "search.training.seed = 3: expected a list"),
        ({"arms.untrained.search": [3]}, "arms.untrained: search = 3: there is no such option"),
        ({"arms.untrained.search": {"training.sede": [3]}}, "arms.untrained: training.sede"),
        ({"arms.untrained.search": {"training.seed": [3]}, "data.validation": 0}, "search needs validation data"),
        ({"arms.untrained.recipe": "compare"}, "expected one that is a TrainingRecipe"),
        ({"training.output_dir": None}, "training.output_dir is missing"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_values({**values, **changes} if "arms" in changes else merge(values, changes))


def test_data_of_all_arms_are_checked_before_anything_is_deleted(values: dict[str, Any]) -> None:
    one_epoch = merge(values, {"training.num_train_epochs": 1, "seeds": [0], "keep_models": False})
    folder = Recipe.from_values(one_epoch).run().folder
    assert not list(folder.rglob("*.safetensors"))
    broken = merge(one_epoch, {"arms": {"Fine tuning": {"data": {"columns": {"text": "txt"}}}}})
    with pytest.raises(ConfigurationError, match="txt"):
        Recipe.from_values(broken).run(overwrite=True)
    assert (folder / "results.md").exists()


def test_a_comparison_runs_every_seed_and_continues(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.from_values(values)
    result = recipe.run()
    printed = capsys.readouterr().out
    stored = json.loads((result.folder / "results.json").read_text())
    assert stored == result.metrics
    arms = {arm["name"]: arm for arm in stored["arms"]}
    assert min(arms["Fine tuning"]["scores"]) > max(arms["untrained"]["scores"])
    assert stored["verdict"].startswith("Fine tuning has the best test accuracy")
    for text in (printed, (result.folder / "results.md").read_text()):
        assert stored["verdict"] in text
        assert "| Fine tuning | 1.000 ± 0.000 |" in text
    assert "{'" not in printed, "a run's own output belongs into its log"
    assert "processes" in json.loads((result.folder / "untrained" / "seed-0" / "run.json").read_text())
    assert "plan" not in (result.folder / "untrained" / "seed-0.log").read_text()

    models = sorted(result.folder.rglob("model.safetensors"))
    assert len(models) == 4
    written = [model.stat().st_mtime_ns for model in models]
    with pytest.raises(ConfigurationError, match="not empty"):
        recipe.run()
    assert recipe.run(resume=True).metrics == stored
    assert [model.stat().st_mtime_ns for model in models] == written

    values["arms"]["LoRA"] = {"recipe": "lora"}
    grown = Recipe.from_values(values).run(resume=True).metrics
    assert grown["arms"][:2] == stored["arms"]
    assert [arm["name"] for arm in grown["arms"]] == ["untrained", "Fine tuning", "LoRA"]
    assert [model.stat().st_mtime_ns for model in models] == written

    (result.folder / "untrained" / "seed-1" / "run.json").unlink()
    with pytest.raises(ConfigurationError, match="holds no run"):
        Recipe.from_values(values).run(resume=True)


def test_a_search_chooses_on_validation_data_and_says_so(values: dict[str, Any]) -> None:
    arm = {"recipe": "fine_tune", "search": {"training.learning_rate": [0.0, 0.01]}}
    result = Recipe.from_values({**values, "arms": {"searched": arm}, "seeds": [3]}).run()
    assert result.metrics["arms"][0]["chosen"] == {"training.learning_rate": 0.01}
    assert (
        "Chosen for searched on validation data with seed 3: training.learning_rate=0.01."
        in (result.folder / "results.md").read_text()
    )
    tried = sorted((result.folder / "searched" / "search").glob("*/metrics.json"))
    assert len(tried) == 2
    assert not any("test" in json.loads(path.read_text()) for path in tried), "the test split waits for the choice"
