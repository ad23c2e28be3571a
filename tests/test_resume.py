"""A run that is interrupted and resumed ends bit for bit where the straight run ends."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import L2SP
from hf_transfer.schedules import GradualUnfreeze, SlantedTriangular
from hf_transfer.training.trainer import TransferTrainer
from tests.objectives import Critic
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama

STEPS = 12


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def full():
    return {
        "model": tiny_bert(dropout=0.1),
        "train_dataset": text_rows(),
        "objectives": [Critic(weight=0.3), L2SP(weight=0.1)],
        "unfreeze": GradualUnfreeze(until=0.8),
        "layer_decay": 0.8,
        "learning_rate_schedule": SlantedTriangular(),
    }


def lora():
    adapted = get_peft_model(
        tiny_bert(dropout=0.1), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1)
    )
    return {**full(), "model": adapted}


def language_model():
    return {"model": tiny_llama(), "train_dataset": language_rows(), "unfreeze": GradualUnfreeze(epochs_per_level=0.5)}


CASES = {case.__name__: case for case in (full, lora, language_model)}


def run(case: str, folder, *, stop: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    trainer = TransferTrainer(
        args=arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=100),
        data_collator=collate,
        callbacks=[StopAt(stop)],
        **CASES[case](),
    )
    trainer.train(resume_from_checkpoint=resume)
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if trainer.scaffold is not None:
        state |= {f"scaffold.{name}": value for name, value in trainer.scaffold.objectives.state_dict().items()}
    return state


@pytest.fixture(scope="module", params=sorted(CASES))
def straight(request, tmp_path_factory):
    return request.param, run(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7, 8, 10, 11])
def test_resumed_equals_straight(straight, tmp_path, stop):
    case, expected = straight
    run(case, tmp_path, stop=stop)
    resumed = run(case, tmp_path, resume=True)
    assert expected.keys() == resumed.keys()
    different = [name for name in expected if not torch.equal(expected[name], resumed[name])]
    assert not different


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run("language_model", tmp_path, stop=2)
    trainer = TransferTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=STEPS),
        data_collator=collate,
        train_dataset=language_rows(),
        objectives=[L2SP()],
    )
    with pytest.raises(ConfigurationError, match="not saved by a run with objectives l2sp"):
        trainer.train(resume_from_checkpoint=True)
