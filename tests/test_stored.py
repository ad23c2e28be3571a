"""Learning from a stored teacher is learning from the teacher, and from no other data's."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from hf_transfer.batches import EXAMPLE_INDEX
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import Distillation, StoredDistillation
from hf_transfer.teacher_store import TeacherStore
from hf_transfer.training.distillation import DistillationTrainer
from tests.tiny import VOCABULARY, arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama

ADAM = {"adam_epsilon": 1e-2, "max_grad_norm": 0.0}  # where a gradient is nearly zero, Adam would double the rounding


def loud(model):
    """With the opinions of a trained model."""
    head = model.get_output_embeddings() or model.classifier
    with torch.no_grad():
        head.weight.mul_(40)
    return model


def rows() -> Dataset:
    return language_rows(12).remove_columns("domain")


def stored(folder, teacher=None, dataset=None, **options) -> TeacherStore:
    dataset = rows() if dataset is None else dataset
    options = {"k": VOCABULARY, "batch_size": 4, "rows_per_shard": 20} | options
    return TeacherStore.build(teacher or loud(tiny_llama(seed=5)), dataset, collate, directory=folder, **options)


def value_and_gradient(objective, student, batch):
    objective.prepare(student)
    student.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    value = objective(student, batch, student(**inputs), 0.0)
    value.backward()
    return value.item(), torch.cat([each.grad.flatten() for each in student.parameters() if each.grad is not None])


def some_batch(dataset, *chosen: int):
    batch = collate([dataset[index] for index in chosen])
    return batch | {EXAMPLE_INDEX: torch.tensor(chosen)}


def test_all_tokens_stored_teach_as_the_teacher_does(tmp_path):
    teacher, student = loud(tiny_llama(seed=5)), loud(tiny_llama())
    batch = some_batch(rows(), 7, 0, 11)
    found = value_and_gradient(StoredDistillation(stored(tmp_path, teacher), temperature=3.0), student, batch)
    expected = value_and_gradient(Distillation(teacher, temperature=3.0), student, batch)
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    assert torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0) > 0.99999
    assert found[1].norm().item() == pytest.approx(expected[1].norm().item(), rel=2e-3)


def test_the_more_is_stored_the_nearer_to_the_full_divergence(tmp_path):
    """A lower bound that rises to it."""
    teacher, student = loud(tiny_llama(seed=5)), loud(tiny_llama())
    batch = some_batch(rows(), 7, 0, 11)
    full, gradient = value_and_gradient(Distillation(teacher), student, batch)
    values, errors = [], []
    for k in (2, 8, 32, VOCABULARY):
        found = value_and_gradient(StoredDistillation(stored(tmp_path / str(k), teacher, k=k)), student, batch)
        values.append(found[0])
        errors.append((found[1] - gradient).norm() / gradient.norm())
    assert values == sorted(values)
    assert 0 < values[0] < 0.98 * full
    assert values[-1] == pytest.approx(full, rel=2e-3)
    assert errors == sorted(errors, reverse=True)


def test_samples_teach_the_same_on_average(tmp_path):
    teacher, student = loud(tiny_llama(seed=5)), loud(tiny_llama())
    batch = some_batch(rows(), 7, 0, 11)
    full, gradient = value_and_gradient(Distillation(teacher), student, batch)
    found = []
    for seed in range(40):
        store = stored(tmp_path / str(seed), teacher, form="samples", temperature=2.0, seed=seed)
        found.append(value_and_gradient(StoredDistillation(store), student, batch))
    values, gradients = torch.tensor([value for value, _ in found]), torch.stack([each for _, each in found])
    assert (values.mean() - full).abs() < 4 * values.std() / 40**0.5
    assert values.std() > 0
    one, all_of_them = ((each - gradient).norm() / gradient.norm() for each in (gradients[0], gradients.mean(0)))
    assert all_of_them < one / 3, "the error of a mean of 40 is about a sixth of one's"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_training_from_the_store_is_training_with_the_teacher(fused, tmp_path):
    """Shuffled batches, two micro-batches a step: every row meets the prediction that was made of it."""
    teacher = loud(tiny_llama(seed=5))

    def trained(source):
        trainer = DistillationTrainer(
            tiny_llama(),
            arguments(tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=2, **ADAM),
            teacher=source,
            train_dataset=rows(),
            data_collator=collate,
            fused_loss=fused,
        )
        trainer.train()
        assert (trainer._head is not None) == fused
        losses = [entry["distillation_loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer.model.state_dict(), losses

    weights, losses = trained(stored(tmp_path / "store", teacher))
    expected, expected_losses = trained(teacher)
    assert losses == pytest.approx(expected_losses, rel=5e-3)
    start = tiny_llama().state_dict()
    for name, value in weights.items():
        moved = (expected[name] - start[name]).norm()
        assert (value - expected[name]).norm() <= 0.02 * moved, name


def with_labels(model, *names: str):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def test_a_classifiers_labels_in_another_order_are_read_in_the_students(tmp_path, caplog):
    teacher = with_labels(loud(tiny_bert(seed=5)), "a", "b", "c")
    student = with_labels(loud(tiny_bert()), "c", "a", "b")
    dataset = text_rows(10).remove_columns("domain")
    store = stored(tmp_path, teacher, dataset)
    batch = some_batch(dataset, 3, 1, 8)
    with caplog.at_level(logging.WARNING):
        found = value_and_gradient(StoredDistillation(store), student, batch)
    expected = value_and_gradient(Distillation(teacher), student, batch)
    assert "stand in another order" in caplog.text
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-4)


def test_padding_of_the_teachers_vocabulary_is_left_out(tmp_path):
    teacher = loud(tiny_llama(seed=5, vocab_size=VOCABULARY + 9))
    with pytest.raises(ConfigurationError, match=r"69 tokens, the student has 60.*vocabulary=60"):
        StoredDistillation(stored(tmp_path / "padded", teacher)).prepare(tiny_llama())
    batch = some_batch(rows(), 2, 5)
    student = loud(tiny_llama())
    store = stored(tmp_path / "cut", teacher, vocabulary=VOCABULARY)
    found = value_and_gradient(StoredDistillation(store), student, batch)
    expected = value_and_gradient(Distillation(teacher, vocabulary=VOCABULARY), student, batch)
    assert found[0] == pytest.approx(expected[0], rel=2e-3)


def test_refused(tmp_path):
    store = stored(tmp_path / "top")
    samples = stored(tmp_path / "samples", form="samples", temperature=2.0)
    with pytest.raises(ConfigurationError, match="expected at least 1"):
        StoredDistillation(store, temperature=0.5)
    with pytest.raises(ConfigurationError, match=r"drawn at 2\.0"):
        StoredDistillation(samples, temperature=3.0)
    with pytest.raises(ConfigurationError, match=r"causal language model.*cannot teach BertForSequenceClassification"):
        StoredDistillation(store).prepare(tiny_bert())
    with pytest.raises(ConfigurationError, match="a stored teacher serves 'forward_kl'"):
        DistillationTrainer(tiny_llama(), teacher=store, divergence="reverse_kl")
    others = {"found 5 examples, but the teacher's store": rows().select(range(5)), "data: found": rows().shuffle(3)}
    for message, dataset in others.items():
        with pytest.raises(ConfigurationError, match=message):
            DistillationTrainer(
                tiny_llama(), arguments(tmp_path), teacher=store, train_dataset=dataset, data_collator=collate
            )
    objective = StoredDistillation(store)
    objective.prepare(tiny_llama())
    batch = some_batch(rows(), 2, 5)
    batch["labels"][0, 1] = -100 if batch["labels"][0, 1] != -100 else 7
    with pytest.raises(ConfigurationError, match="its labels are not those"):
        objective(tiny_llama(), batch, tiny_llama()(batch["input_ids"]), 0.0)


@pytest.mark.parametrize("form", ["top_k", "samples"])
def test_an_encoder_decoder_is_stored_by_its_labels(form, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    dataset = Dataset.from_list([{"input_ids": tokens(3, 9), "labels": tokens(2, 6)} for _ in range(10)])
    dataset = dataset.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )

    def model(seed: int):
        torch.manual_seed(seed)
        return loud(T5ForConditionalGeneration(config)).eval()

    teacher, student = model(5), model(0)
    batch = some_batch(dataset, 7, 0, 4)
    expected = value_and_gradient(Distillation(teacher), student, batch)
    options = {} if form == "top_k" else {"form": form, "temperature": 2.0, "draws": 4000}
    store = stored(tmp_path, teacher, dataset, **options)
    assert store.rows(torch.tensor([7, 0, 4])).at_temperature(2.0).ids.shape[0] == (batch["labels"] != -100).sum()
    found = value_and_gradient(StoredDistillation(store), student, batch)
    tolerance = {"top_k": 2e-3, "samples": 0.1}[form]
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert (found[1] - expected[1]).norm() < tolerance * 5 * expected[1].norm()
