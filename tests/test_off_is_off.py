"""With every option off, the run is plain Trainer's."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from hf_transfer.training.trainer import TransferTrainer
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama


def run(kind, model, rows, folder, **changes):
    trainer = kind(
        model,
        arguments(folder, eval_strategy="epoch", num_train_epochs=2, **changes),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows.select(range(10)),
    )
    trainer.train()
    losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return losses, trainer.model.state_dict()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_causal_language_model_bit_for_bit(tmp_path, accumulate):
    changes = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate}
    plain = run(Trainer, tiny_llama(), language_rows(), tmp_path, **changes)
    ours = run(TransferTrainer, tiny_llama(), language_rows(), tmp_path, **changes)
    assert plain[0] == ours[0]
    assert all(torch.equal(value, ours[1][name]) for name, value in plain[1].items())


def test_classifier_bit_for_bit_without_accumulation(tmp_path):
    plain = run(Trainer, tiny_bert(dropout=0.1), text_rows(), tmp_path)
    ours = run(TransferTrainer, tiny_bert(dropout=0.1), text_rows(), tmp_path)
    assert plain[0] == ours[0]
    assert all(torch.equal(value, ours[1][name]) for name, value in plain[1].items())


def test_label_smoothing_is_plain_trainers(tmp_path):
    plain = run(Trainer, tiny_bert(), text_rows(), tmp_path, label_smoothing_factor=0.1)
    ours = run(TransferTrainer, tiny_bert(), text_rows(), tmp_path, label_smoothing_factor=0.1)
    assert plain[0] == ours[0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_function_of_the_users_is_called_as_plain_trainer_calls_it(tmp_path, accumulate):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    changes = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate}
    losses = []
    for kind in (Trainer, TransferTrainer):
        trainer = kind(
            tiny_bert(),
            arguments(tmp_path, **changes),
            data_collator=collate,
            train_dataset=text_rows(),
            compute_loss_func=loss,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_unit_decay_is_off(tmp_path):
    """``layer_decay=1`` and ``base_ratio=1`` are no options at all: the optimizer has plain Trainer's two groups."""
    for options in ({"layer_decay": 1.0}, {"base_ratio": 1.0}):
        trainer = TransferTrainer(tiny_bert(), arguments(tmp_path), train_dataset=text_rows(), **options)
        assert len(trainer.create_optimizer().param_groups) == 2
