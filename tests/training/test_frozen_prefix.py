"""Training from the cached activations of the frozen prefix is training with that prefix, only cheaper."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_transfer.errors import ConfigurationError
from hf_transfer.schedules import GradualUnfreeze, TopLevels
from hf_transfer.training.trainer import TransferTrainer
from tests.objectives import Critic
from tests.test_resume import StopAt
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama


def lora():
    return get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


MODELS = {
    "bert": (tiny_bert, text_rows),
    "lora": (lora, text_rows),
    "llama": (tiny_llama, language_rows),
}


def train(kind, folder, cache, *, stop=None, resume=False, epochs=6, **options):
    model, rows = MODELS[kind]
    trainer = TransferTrainer(
        model(),
        arguments(folder, num_train_epochs=epochs, eval_strategy="epoch", save_strategy="steps", save_steps=1000),
        data_collator=collate,
        train_dataset=rows(),
        eval_dataset=rows(10, seed=1),
        unfreeze=GradualUnfreeze(),
        callbacks=[StopAt(stop)],
        frozen_prefix_cache=cache,
        frozen_prefix_dtype="float32",
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {
        (key, entry["step"]): entry[key]
        for entry in trainer.state.log_history
        for key in ("loss", "eval_loss")
        if key in entry
    }
    return losses, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_same_losses_and_weights_as_without_the_cache(kind, tmp_path):
    """Six epochs: the head, each of three blocks, the embeddings, and all of it once more."""
    plain, weights = train(kind, tmp_path / "plain", None)
    cached, cached_weights = train(kind, tmp_path / "cached", tmp_path / "cache")
    assert cached == pytest.approx(plain, abs=2e-4)
    for name, value in weights.items():
        torch.testing.assert_close(cached_weights[name], value, atol=2e-3, rtol=0)


@pytest.mark.parametrize("stop", [2, 4, 10, 18, 22])
def test_resumes_bit_for_bit(tmp_path, stop):
    straight = train("bert", tmp_path / "straight", tmp_path / "cache")
    train("bert", tmp_path / "cut", tmp_path / "cache", stop=stop)
    resumed = train("bert", tmp_path / "cut", tmp_path / "cache", resume=True)
    last = ("loss", 24)
    assert straight[0][last] == resumed[0][last]
    assert all(torch.equal(value, resumed[1][name]) for name, value in straight[1].items())


def test_what_cannot_be_cached_is_refused(tmp_path):
    def make(**options):
        return TransferTrainer(
            tiny_bert(), arguments(tmp_path), frozen_prefix_cache=tmp_path, **{"train_dataset": text_rows(), **options}
        )

    with pytest.raises(ConfigurationError, match="nothing is frozen"):
        make()
    with pytest.raises(ConfigurationError, match="found list"):
        make(unfreeze=TopLevels(1), train_dataset=list(text_rows()))
    with pytest.raises(ConfigurationError, match="critic reads hidden states"):
        make(unfreeze=TopLevels(1), objectives=[Critic()])
