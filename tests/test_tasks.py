"""Scores against definitions written out by hand, and what evaluation keeps in memory."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, Trainer

from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import (
    TASKS,
    bits_per_character,
    entity_scores,
    entity_spans,
    find_task,
    language_model_scores,
    language_model_sums,
    multi_label_scores,
    regression_scores,
    single_label_scores,
    token_scores,
)
from tests.folders import write_tokenizer
from tests.tiny import VOCABULARY, arguments, language_rows, text_rows, tiny_bert, tiny_llama


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="'sequence-classifcation'.*Did you mean 'sequence-classification'"):
        find_task("sequence-classifcation")


def test_single_label_scores():
    predicted, labels = [0, 0, 1, 1, 2, 0], np.array([0, 0, 0, 1, 1, 1])
    scores = single_label_scores(np.eye(3)[predicted], labels)
    # F1 by class: 0: 2*2/(3+3), 1: 2*1/(2+3), 2: 0 (predicted once, never true)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx((4 / 6 + 2 / 5 + 0) / 3)
    # R_k statistic: (c*s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))
    expected = (3 * 6 - (3 * 3 + 2 * 3)) / math.sqrt((36 - (9 + 4 + 1)) * (36 - 18))
    assert scores["matthews_correlation"] == pytest.approx(expected)


def test_multi_label_scores_cut_at_probability_one_half():
    logits = np.array([[0.1, -0.1, 3.0], [-2.0, -0.2, 0.3]])
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    scores = multi_label_scores(logits, labels)
    assert scores["subset_accuracy"] == 0.5
    assert scores["micro_f1"] == pytest.approx(2 * 3 / (3 + 4))
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 1) / 3)


def test_regression_scores():
    predictions, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 9.0])
    scores = regression_scores(predictions, labels)
    assert scores["mse"] == pytest.approx((0 + 1 + 25) / 3)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 9])[0, 1])
    assert scores["spearman"] == pytest.approx(1.0)


def test_a_constant_prediction_correlates_with_nothing():
    scores = regression_scores(np.full((3, 1), 2.0), np.array([1.0, 2.0, 3.0]))
    assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", []),
        ("B-x I-x O B-y", [("x", 0, 2), ("y", 3, 4)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("B-x I-x", [("x", 0, 2)]),
        ("B-x-y I-x-y O", [("x-y", 0, 2)]),
        # malformed: an I- that continues nothing of its type opens an entity
        ("I-x I-x O", [("x", 0, 2)]),
        ("O I-x", [("x", 1, 2)]),
        ("B-x I-y I-y", [("x", 0, 1), ("y", 1, 3)]),
        ("I-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("", []),
    ],
)
def test_entity_spans(tags, spans):
    assert sorted(entity_spans(tags.split())) == sorted(spans)


def test_entities_count_only_with_type_and_both_ends_right():
    truth = ["B-x I-x O B-y".split(), "O B-x".split(), "B-y I-y".split()]
    predicted = ["B-x I-x O B-x".split(), "O B-x".split(), "B-y O".split()]
    scores = entity_scores(predicted, truth)
    assert scores == pytest.approx({"precision": 2 / 4, "recall": 2 / 4, "f1": 2 / 4})


def test_entity_scores_without_entities_are_zero():
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_token_scores_leave_out_what_is_not_labelled():
    names = ["O", "B-x", "I-x"]
    labels = np.array([[-100, 1, -100, 2, 0, -100], [-100, 0, 1, -100, -100, -100]])
    predicted = np.array([[2, 1, 0, 2, 0, 1], [1, 0, 0, -100, -100, -100]])  # -100 where a batch was shorter
    scores = token_scores(predicted, labels, names=names)
    assert scores["token_accuracy"] == pytest.approx(4 / 5)
    assert scores["precision"] == 1.0
    assert scores["recall"] == 0.5


def test_tags_that_are_not_bio_are_scored_by_class():
    scores = token_scores(np.array([[0, 1, 1]]), np.array([[0, 1, 0]]), names=["NOUN", "VERB"])
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    assert TASKS["token-classification"].metrics(None, ["NOUN", "VERB"]).best in scores


def test_perplexity_is_exact_over_ragged_batches(tmp_path, tokenizer):
    """The Trainer's own evaluation loss is a mean of batch means; perplexity must be of all tokens at once."""
    model, rows, task = tiny_llama(), language_rows(13), TASKS["causal-lm"]
    metrics = task.metrics(None, [])
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        data_collator=task.collator(tokenizer),
        eval_dataset=rows.remove_columns(["domain"]),
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    result = trainer.evaluate()
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            scores = log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), dim=-1)
            for position, target in enumerate(row["labels"][1:]):
                if target != -100:
                    total -= float(scores[position, target])
                    right += int(scores[position].argmax() == target)
                    count += 1
    assert result["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result["eval_token_accuracy"] == pytest.approx(right / count)
    assert abs(result["eval_loss"] - total / count) > 1e-4, "batches are not ragged enough to tell the difference"
    assert metrics.best in {name.removeprefix("eval_") for name in result}


def test_a_language_model_keeps_three_numbers_per_sequence():
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, -100, -100]])
    sums = language_model_sums((logits, "cache"), labels)
    assert sums.shape == (2, 3)
    assert sums[:, 2].tolist() == [4, 1]


def test_a_hopeless_perplexity_is_infinite_and_not_an_overflow():
    assert language_model_scores(np.array([[9000.0, 0.0, 9.0]]), np.zeros((1, 10)))["perplexity"] == math.inf


def test_bits_per_character_do_not_depend_on_the_tokenizer():
    # the same text at the same total cost, cut into 100 or into 25 tokens
    text, nats = 200, 120.0
    fine = bits_per_character(math.exp(nats / 100), characters_per_token=text / 100)
    coarse = bits_per_character(math.exp(nats / 25), characters_per_token=text / 25)
    assert fine == pytest.approx(coarse) == pytest.approx(nats / math.log(2) / text)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 1)],
)
def test_each_problem_type_evaluates_with_its_best_metric(tmp_path, tokenizer, problem_type, labels):
    task = TASKS["sequence-classification"]
    metrics = task.metrics(problem_type, [])
    rows = text_rows(10).remove_columns(["domain"])
    if problem_type != "single_label_classification":
        rows = rows.map(lambda row: {"labels": [float(row["labels"] == label) for label in range(labels)]})
    trainer = Trainer(
        tiny_bert(num_labels=labels, problem_type=problem_type),
        arguments(tmp_path),
        data_collator=task.collator(tokenizer),
        eval_dataset=rows,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    result = trainer.evaluate()
    assert math.isfinite(result[f"eval_{metrics.best}"])
    assert metrics.greater_is_better == (problem_type != "regression")


def test_padding_does_not_hide_the_end_of_text_token(tokenizer):
    """Models that pad with it must still learn where a text ends."""
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, end], [7, end])]
    batch = TASKS["causal-lm"].collator(tokenizer)(rows)
    assert batch["labels"].tolist() == [[5, 6, end], [7, end, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
