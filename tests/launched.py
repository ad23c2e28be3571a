"""One training run whose gradients, weights and losses are written down; started in this process or by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_transfer.data.domains import DomainPairs
from hf_transfer.data.teacher_tokens import TeacherCollator
from hf_transfer.objectives import (
    CORAL,
    L2SP,
    MMD,
    ConditionalAdversarial,
    CrossTokenizerDistillation,
    Distillation,
    DomainAdversarial,
    JointMMD,
)
from hf_transfer.schedules import GradualUnfreeze, Ramp
from hf_transfer.training.trainer import TransferTrainer
from tests.objectives import Critic, SoftTargets, TokenEntropy
from tests.tiny import arguments, collate, language_rows, teacher_rows, text_rows, tiny_bert, tiny_llama


class Recorder(TrainerCallback):
    """Copies the gradient of every optimizer step as the optimizer gets it."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"{state.global_step}/{name.removeprefix('module.')}"] = parameter.grad.clone()


def everything_on() -> dict:
    """LoRA, a critic, distillation, L2-SP, gradual unfreezing and layer decay at once."""
    model = get_peft_model(
        tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    )
    return {
        "model": model,
        "train_dataset": text_rows(),
        "objectives": [Critic(weight=Ramp()), SoftTargets(weight=0.5), L2SP(weight=0.1)],
        "unfreeze": GradualUnfreeze(until=0.5),
        "layer_decay": 0.8,
    }


def full_fine_tuning() -> dict:
    """With activation checkpointing, for which the Trainer would let DDP wait for the gradients of frozen layers."""
    return {
        "model": tiny_bert(),
        "train_dataset": text_rows(),
        "unfreeze": GradualUnfreeze(until=0.5),
        "arguments": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    }


def causal_language_model() -> dict:
    return {"model": tiny_llama(), "train_dataset": language_rows(), "objectives": [TokenEntropy(weight=0.3)]}


def gpt2() -> dict:
    """A language model whose class name does not tell the Trainer that its loss shifts the labels."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return {"model": GPT2LMHeadModel(config), "train_dataset": language_rows()}


def distilled_language_model() -> dict:
    """With a fused loss, a teacher's distribution, and L2-SP beside them."""
    return {
        "model": tiny_llama(),
        "train_dataset": language_rows(),
        "objectives": [Distillation(tiny_llama(seed=5), weight=0.5), L2SP(weight=0.1)],
        "task_weight": 0.5,
        "fused_loss": True,
    }


def cross_tokenizer() -> dict:
    """A teacher of another vocabulary, compared at from none to all positions of a row."""
    return {
        "model": tiny_llama(),
        "train_dataset": teacher_rows(),
        "objectives": [CrossTokenizerDistillation(tiny_llama(seed=5, layers=1, vocab_size=90), span_weight=0.5)],
        "data_collator": TeacherCollator(collate),
    }


def domain_pairs() -> DomainPairs:
    source, target = (text_rows(count, seed=seed).remove_columns("domain") for count, seed in ((32, 0), (12, 9)))
    return DomainPairs(source, target)


def adversarial() -> dict:
    """Two critics of every row, one of which sees the predictions; only source rows have labels."""
    critics = [DomainAdversarial(weight=0.5, hidden_size=8), ConditionalAdversarial(strength=0.7, hidden_size=8)]
    return {"model": tiny_bert(), "train_dataset": domain_pairs(), "objectives": critics}


def discrepancies() -> dict:
    """Terms that couple the rows of a batch: the same on any number of ranks, not for any size of micro-batches."""
    terms = [
        MMD(estimator="unbiased"),
        JointMMD(pooling="mean", weight=0.5),
        CORAL(pooling=["cls", "bert.encoder.layer.0"], weight=Ramp()),
    ]
    return {"model": tiny_bert(), "train_dataset": domain_pairs(), "objectives": terms}


CASE_FUNCTIONS = (
    everything_on,
    full_fine_tuning,
    causal_language_model,
    gpt2,
    distilled_language_model,
    cross_tokenizer,
    adversarial,
    discrepancies,
)
CASES = {case.__name__: case for case in CASE_FUNCTIONS}
COUPLED = ("discrepancies",)


def train(case: str, folder: Path, *, batch: int, accumulate: int, examples: int = 32) -> dict[str, torch.Tensor]:
    """One epoch of ``CASES[case]``; returns gradients by step, losses, final weights and the scaffold's."""
    recorder = Recorder()
    options = CASES[case]()
    options["train_dataset"] = first_of(options["train_dataset"], examples)
    trainer = TransferTrainer(
        args=arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            adam_epsilon=1e-2,
            **options.pop("arguments", {}),
        ),
        data_collator=options.pop("data_collator", collate),
        callbacks=[recorder],
        **options,
    )
    trainer.train()
    record = dict(recorder.gradients)
    record |= {f"final/{name}": value.detach() for name, value in trainer.model.named_parameters()}
    record |= {
        f"loss/{entry['step']}": torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    }
    if trainer.scaffold is not None:
        record |= {f"scaffold/{name}": value for name, value in trainer.scaffold.objectives.state_dict().items()}
    return {name: value.detach().clone().contiguous() for name, value in record.items()}


def first_of(dataset: Dataset | DomainPairs, examples: int) -> Dataset | DomainPairs:
    if isinstance(dataset, DomainPairs):
        return DomainPairs(*(first_of(rows, examples) for rows in dataset.rows.values()))
    return dataset.select(range(min(examples, len(dataset))))


def launch(folder: Path, *, ranks: int, cuts: list[tuple[int, int]]) -> None:
    """Every case at every (batch, accumulate) of ``cuts`` under one torchrun that really had ``ranks`` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "tests.launched", str(folder), json.dumps(cuts)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [json.loads((folder / f"world{rank}.json").read_text()) for rank in range(ranks)] == [ranks] * ranks


def record_of(folder: Path, case: str, rank: int, *, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case}-{batch}-{accumulate}-rank{rank}.safetensors")


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for case, (batch, accumulate) in product(CASES, json.loads(sys.argv[2])):
        result = train(case, folder, batch=batch, accumulate=accumulate)
        save_file(result, folder / f"{case}-{batch}-{accumulate}-rank{rank}.safetensors")
    (folder / f"world{rank}.json").write_text(json.dumps(torch.distributed.get_world_size()))
