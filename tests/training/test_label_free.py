"""What evaluations tell of a target without its labels, and what is chosen by it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import EarlyStoppingCallback

from hf_transfer.data.domains import DomainPairs
from hf_transfer.errors import ConfigurationError
from hf_transfer.scores import deep_embedded_risk, density_ratios, mean_entropy, proxy_a_distance
from hf_transfer.training.domains import DomainAdversarialTrainer, DomainAlignmentTrainer
from hf_transfer.training.label_free import CRITERIA, selections
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama


def rows(count, seed):
    return text_rows(count, seed=seed).remove_columns("domain")


def trainer_of(folder, *, trainer=DomainAlignmentTrainer, model=None, **options):
    changes = options.pop("changes", {})
    return trainer(
        model or tiny_bert(),
        arguments(folder, per_device_eval_batch_size=3, **changes),
        train_dataset=DomainPairs(rows(16, 0), rows(12, 1)),
        data_collator=collate,
        **{"eval_dataset": rows(14, 2), **options},
    )


def test_an_evaluation_has_the_scores_of_whole_data_sets(tmp_path):
    """Batches of 3 of 14 and 12 examples, against one pass over each."""
    trainer = trainer_of(tmp_path)
    found = trainer.evaluate()
    model = trainer.model.eval()
    with torch.no_grad():
        source, target = (collate(list(each)) for each in (rows(14, 2), rows(12, 1)))
        labels, _ = source.pop("labels"), target.pop("labels")
        ours, theirs = (model.bert(**each).pooler_output for each in (source, target))
        ratios = density_ratios(ours, theirs)
        losses = functional.cross_entropy(model.classifier(ours), labels, reduction="none")
    assert found["eval_proxy_a_distance"] == pytest.approx(proxy_a_distance(ours, theirs))
    assert found["eval_deep_embedded_risk"] == pytest.approx(deep_embedded_risk(losses, ratios), rel=1e-4)
    assert found["eval_target_entropy"] == pytest.approx(mean_entropy(model.classifier(theirs)), rel=1e-4)
    assert {f"eval_{name}" for name in CRITERIA} <= found.keys()
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_scores_can_choose_the_best_checkpoint(tmp_path):
    changes = {
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_target_entropy",
        "greater_is_better": False,
    }
    trainer = trainer_of(tmp_path, trainer=DomainAdversarialTrainer, changes=changes)
    trainer.train()
    scores = [entry["eval_target_entropy"] for entry in trainer.state.log_history if "eval_target_entropy" in entry]
    assert len(scores) == 3
    assert trainer.state.best_metric == min(scores)
    assert trainer.evaluate()["eval_target_entropy"] == pytest.approx(min(scores), rel=1e-5)


@pytest.mark.parametrize("given", [True, None])
def test_which_way_is_better_is_known(tmp_path, given):
    changes = {"metric_for_best_model": "deep_embedded_risk", "greater_is_better": given}
    assert trainer_of(tmp_path, changes=changes).args.greater_is_better is False
    changes = {"metric_for_best_model": "eval_soft_neighborhood_density"}
    assert trainer_of(tmp_path, changes=changes).args.greater_is_better is True


def test_workers_that_stay_do_not_mix_up_the_data_sets(tmp_path):
    changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    oracle = rows(9, 5)
    kept, plain = (trainer_of(tmp_path, oracle_dataset=oracle, changes=each).evaluate() for each in (changes, {}))
    for name in ("eval_loss", "eval_oracle_loss", "eval_target_entropy", "eval_proxy_a_distance"):
        assert kept[name] == pytest.approx(plain[name])
    assert plain["eval_loss"] != plain["eval_oracle_loss"]


def test_the_default_target_examples_are_spread_over_the_set(tmp_path):
    data = DomainPairs(rows(16, 0), text_rows(2100, seed=1).remove_columns("domain"))
    trainer = DomainAlignmentTrainer(tiny_bert(), arguments(tmp_path), train_dataset=data, data_collator=collate)
    assert list(trainer.target_eval_dataset.indices)[:2] == [0, 3]
    assert trainer.target_eval_dataset.indices[-1] > 2000


def test_features_that_are_no_numbers_do_not_stop_the_run(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    with torch.no_grad():
        trainer.model.bert.pooler.dense.weight.fill_(torch.nan)
    assert "eval_proxy_a_distance" not in trainer.evaluate()
    assert "no finite numbers" in caplog.text


def test_several_sets_to_evaluate_on(tmp_path):
    named = {"first": rows(6, 2), "second": rows(6, 3)}
    found = trainer_of(tmp_path, eval_dataset=named).evaluate()
    assert "eval_first_loss" in found
    assert not any("entropy" in name for name in found)
    with pytest.raises(ConfigurationError, match="eval_dataset: found several; expected one"):
        trainer_of(tmp_path, eval_dataset=named, oracle_dataset=rows(6, 5))


def test_early_stopping_goes_by_the_metric_it_was_told(tmp_path, caplog):
    changes = {
        "num_train_epochs": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "target_entropy",
    }
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer_of(tmp_path, oracle_dataset=rows(9, 5), callbacks=[stop], changes=changes).train()
    assert "early stopping required" not in caplog.text


def test_target_labels_are_read_for_the_oracle_alone(tmp_path):
    labelled = rows(9, 5)
    with_labels = trainer_of(tmp_path, oracle_dataset=labelled).evaluate()
    without = trainer_of(tmp_path).evaluate()
    assert "eval_oracle_loss" in with_labels
    timing = ("time", "per_second")
    assert {key: value for key, value in without.items() if not key.endswith(timing)} == {
        key: value for key, value in with_labels.items() if "oracle" not in key and not key.endswith(timing)
    }
    other = trainer_of(tmp_path, target_eval_dataset=labelled).evaluate()
    unlabelled = trainer_of(tmp_path, target_eval_dataset=labelled.remove_columns("labels")).evaluate()
    assert other["eval_target_entropy"] == unlabelled["eval_target_entropy"] != without["eval_target_entropy"]


def test_other_data_and_no_scores(tmp_path):
    trainer = trainer_of(tmp_path)
    assert "eval_target_entropy" not in trainer.evaluate(rows(5, 7))
    assert "eval_target_entropy" not in trainer_of(tmp_path, target_eval_dataset=False).evaluate()


def test_of_a_language_model_the_distance_alone(tmp_path):
    source, target = (language_rows(12, seed=seed).remove_columns("domain") for seed in (0, 1))
    trainer = DomainAlignmentTrainer(
        tiny_llama(),
        arguments(tmp_path),
        train_dataset=DomainPairs(source, target),
        eval_dataset=source,
        data_collator=collate,
    )
    found = trainer.evaluate()
    assert 0 <= found["eval_proxy_a_distance"] <= 2
    assert "eval_deep_embedded_risk" not in found


HISTORY = [
    {"step": 1, "eval_accuracy": 0.7, "eval_target_entropy": 0.3, "eval_oracle_accuracy": 0.6},
    {"step": 2, "eval_accuracy": 0.9, "eval_target_entropy": 0.5, "eval_oracle_accuracy": 0.5},
    {"step": 2, "loss": 1.0},
    {"step": 3, "eval_accuracy": 0.8, "eval_target_entropy": 0.4, "eval_oracle_accuracy": 0.8},
]


def test_each_way_of_choosing_takes_its_own():
    options = {"metric": "accuracy", "greater_is_better": True, "criterion": "target_entropy"}
    assert selections(HISTORY, **options) == {
        "source": {"step": 2, "source_accuracy": 0.9, "target_accuracy": 0.5},
        "honest": {"step": 1, "source_accuracy": 0.7, "target_accuracy": 0.6},
        "oracle": {"step": 3, "source_accuracy": 0.8, "target_accuracy": 0.8},
    }
    later = {"step": 3, "eval_accuracy": 0.1, "eval_target_entropy": 0.0, "eval_oracle_accuracy": 0.1}
    assert selections([*HISTORY, later], **options)["honest"]["step"] == 1  # of the best checkpoint, loaded in the end
    blind = [{key: value for key, value in entry.items() if "oracle" not in key} for entry in HISTORY]
    assert selections(blind, **options) == {
        "source": {"step": 2, "source_accuracy": 0.9},
        "honest": {"step": 1, "source_accuracy": 0.7},
    }
    with pytest.raises(ConfigurationError, match="Did you mean 'target_entropy'"):
        selections(HISTORY, metric="accuracy", greater_is_better=True, criterion="target_entrpy")
    with pytest.raises(ConfigurationError, match="No evaluation has 'eval_deep_embedded_risk'"):
        selections(HISTORY, metric="accuracy", greater_is_better=True)
