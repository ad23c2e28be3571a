from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_transfer.errors import ConfigurationError
from hf_transfer.report import RunFolder

RECIPE = {"recipe": "fine_tune", "training": {"seed": 0, "learning_rate": 1e-4}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


def test_a_claimed_folder_tells_what_runs_in_it(folder: RunFolder) -> None:
    folder.claim(RECIPE, seed=0)
    assert folder.read("run.json") == {"made_by": "hf_transfer", "seed": 0, "finished": False}
    assert folder.recipe() == RECIPE
    assert not folder.is_finished
    folder.finish()
    assert folder.is_finished


def test_an_empty_folder_may_be_used(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.claim(RECIPE)
    assert folder.is_ours


def test_a_run_is_never_touched_without_being_told(folder: RunFolder) -> None:
    folder.claim(RECIPE)
    folder.write("metrics.json", {"accuracy": 1.0})
    with pytest.raises(ConfigurationError, match=r"not empty.*--overwrite.*--resume"):
        folder.claim(RECIPE)
    assert folder.read("metrics.json") == {"accuracy": 1.0}


def test_overwrite_deletes_the_run(folder: RunFolder) -> None:
    folder.claim(RECIPE)
    folder.write("metrics.json", {})
    folder.claim({**RECIPE, "recipe": "lora"}, overwrite=True)
    assert not (folder.path / "metrics.json").exists()
    assert folder.recipe()["recipe"] == "lora"


@pytest.mark.parametrize("content", [None, "{}", "[]", "no json", '{"made_by": "someone else"}'])
@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_a_folder_that_is_not_ours_is_neither_deleted_nor_resumed(
    folder: RunFolder, content: str | None, option: str
) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("years of work")
    if content is not None:
        (folder.path / "run.json").write_text(content)
    with pytest.raises(ConfigurationError, match="holds no run of hf_transfer"):
        folder.claim(RECIPE, **{option: True})
    assert (folder.path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_left_alone(folder: RunFolder) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("a file")
    with pytest.raises(ConfigurationError):
        folder.claim(RECIPE, overwrite=True)
    assert folder.path.read_text() == "a file"


def test_resume_takes_the_same_recipe_only(folder: RunFolder) -> None:
    folder.claim(RECIPE)
    folder.claim(RECIPE, resume=True)
    changed = {"recipe": "fine_tune", "training": {"seed": 0, "learning_rate": 1e-3}, "layer_decay": 0.9}
    with pytest.raises(ConfigurationError, match=r"differ from its recipe.yaml: training.learning_rate, layer_decay"):
        folder.claim(changed, resume=True)


def test_a_section_that_may_grow_keeps_what_was_in_it(folder: RunFolder) -> None:
    folder.claim({"arms": {"a": {"rate": 1}}, "seeds": [0, 1]})
    grown = {"arms": {"a": {"rate": 1}, "b": {}}, "seeds": [0, 1, 2]}
    with pytest.raises(ConfigurationError, match="arms.b, seeds"):
        folder.claim(grown, resume=True)
    folder.claim(grown, resume=True, may_grow=["arms", "seeds"])
    assert folder.recipe() == grown
    for changed in ({"arms": {"a": {"rate": 2}, "b": {}}}, {"arms": {"b": {}}}, {"seeds": [1, 2, 3]}):
        with pytest.raises(ConfigurationError, match=next(iter(changed))):
            folder.claim({**grown, **changed}, resume=True, may_grow=["arms", "seeds"])


def test_resume_starts_where_nothing_is(folder: RunFolder) -> None:
    folder.claim(RECIPE, resume=True)
    assert folder.is_ours


def test_overwrite_and_resume_exclude_each_other(folder: RunFolder) -> None:
    with pytest.raises(ConfigurationError, match="only one"):
        folder.claim(RECIPE, overwrite=True, resume=True)


def test_the_last_complete_checkpoint_is_the_one_to_resume_from(folder: RunFolder) -> None:
    folder.claim(RECIPE)
    assert folder.last_checkpoint() is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-best"):
        (folder.path / name).mkdir()
        if name != "checkpoint-11":  # killed while writing it
            (folder.path / name / "trainer_state.json").write_text("{}")
    assert folder.last_checkpoint() == folder.path / "checkpoint-10"


def test_recipe_file_is_plain_yaml(folder: RunFolder) -> None:
    folder.claim(RECIPE)
    assert yaml.safe_load((folder.path / "recipe.yaml").read_text()) == RECIPE
    assert not list(folder.path.glob("*.part"))
