"""Feature extraction: the base runs once and stays as it was, the head is the optimum, the model is ordinary."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_transfer.errors import ConfigurationError
from hf_transfer.training.named import FeatureExtractionTrainer
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama


def make(model, rows, folder, *, changes=None, **options):
    return FeatureExtractionTrainer(
        model,
        arguments(folder, **(changes or {})),
        data_collator=collate,
        train_dataset=rows,
        features_dtype="float32",
        **options,
    )


def base_of(model):
    return {name: value.clone() for name, value in model.base_model.state_dict().items()}


def test_linear_head_is_the_optimum_and_only_the_head_moved(tmp_path):
    """Its probabilities are those of scikit-learn on the features that a float32 forward pass gives."""
    rows, held_out = text_rows(200), text_rows(40, seed=1)
    model = tiny_bert(dropout=0.1)
    before = base_of(model)
    trainer = make(model, rows, tmp_path, eval_dataset=held_out)
    trainer.train()
    assert all(torch.equal(value, model.base_model.state_dict()[name]) for name, value in before.items())

    model.eval()
    with torch.no_grad():
        batch = collate(list(rows.remove_columns("domain")))
        pooled = model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
        logits = model(**batch).logits
    strength = trainer.state.log_history[-1]["head_C"]
    scale = pooled.square().sum(1).mean().sqrt()
    peer = LogisticRegression(C=strength, max_iter=1000).fit(pooled / scale, rows["labels"])
    expected = torch.tensor(peer.predict_proba(pooled / scale))
    torch.testing.assert_close(logits.softmax(-1).double(), expected, atol=5e-3, rtol=0)
    frequencies = torch.tensor([(torch.tensor(rows["labels"]) == label).float().mean() for label in range(3)])
    assert functional.cross_entropy(logits, batch["labels"]) < functional.cross_entropy(
        frequencies.log().expand_as(logits), batch["labels"]
    )


def test_saved_model_is_an_ordinary_one(tmp_path):
    rows = text_rows(60)
    trainer = make(tiny_bert(), rows, tmp_path, eval_dataset=text_rows(20, seed=1))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = collate(list(rows.remove_columns("domain").select(range(8))))
    trainer.model.eval()
    assert torch.equal(plain.eval()(**batch).logits, trainer.model(**batch).logits)


def test_base_runs_once_for_all_epochs_and_runs(tmp_path):
    """A second trainer on the same data finds the features; another base does not."""
    calls = []

    def train(model, changes=None):
        hook = model.bert.encoder.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
        make(model, text_rows(64), tmp_path, changes=changes).train()
        hook.remove()

    train(tiny_bert(), {"num_train_epochs": 10})
    examples = sum(calls)
    assert 64 <= examples < 128
    train(tiny_bert())
    assert sum(calls) - examples < 64  # a few examples to find what the head reads, no pass over the data
    seen = sum(calls)
    train(tiny_bert(seed=1))
    assert sum(calls) - seen >= 64


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(tmp_path, problem):
    numbers = torch.randn(80, 3).tolist() if problem == "regression" else torch.randint(0, 2, (80, 3)).float().tolist()
    rows = text_rows(80).remove_columns("labels").add_column("labels", numbers)
    model = tiny_bert(problem_type=problem)
    if problem == "regression":
        rows = rows.remove_columns("labels").add_column("labels", [row[0] for row in numbers])
        model = tiny_bert(problem_type=problem, num_labels=1)
    trainer = make(model, rows, tmp_path, eval_dataset=rows.select(range(60, 80)))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_two_layer_head_trains_from_the_cache(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        num_labels=3,
        pad_token_id=1,
    )
    model = RobertaForSequenceClassification(config)
    before = base_of(model)
    trainer = make(model, text_rows(64), tmp_path, changes={"num_train_epochs": 20})
    start = trainer.evaluate(text_rows(64))["eval_loss"]
    trainer.train()
    assert trainer.evaluate(text_rows(64))["eval_loss"] < start
    assert all(torch.equal(value, model.base_model.state_dict()[name]) for name, value in before.items())


def test_token_classification_trains_from_the_cache(tmp_path):
    rows = text_rows(64)
    rows = Dataset.from_list(
        [
            {**row, "labels": [token % 3 for token in row["input_ids"]]}
            for row in rows.remove_columns(["labels", "domain"])
        ]
    )
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_bert().config)
    before = base_of(model)
    trainer = make(model, rows, tmp_path, changes={"num_train_epochs": 20})
    start = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.85 * start
    assert all(torch.equal(value, model.base_model.state_dict()[name]) for name, value in before.items())
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "saved").config.num_labels == 3


def test_labels_under_another_name_and_a_loss_of_ones_own(tmp_path):
    rows = text_rows(64).rename_column("labels", "label")
    renaming = lambda examples: {  # noqa: E731
        "labels" if name == "label" else name: value for name, value in collate(examples).items()
    }
    trainer = FeatureExtractionTrainer(
        tiny_bert(), arguments(tmp_path), data_collator=renaming, train_dataset=rows, features_dtype="float32"
    )
    trainer.train()
    assert "head_C" in trainer.state.log_history[-1]

    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return functional.cross_entropy(outputs["logits"], labels)

    make(tiny_bert(), text_rows(32), tmp_path, compute_loss_func=loss).train()
    assert sum(calls) == 32


def test_a_model_without_a_head_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no head"):
        make(tiny_llama(tie_word_embeddings=True), language_rows(), tmp_path).train()
