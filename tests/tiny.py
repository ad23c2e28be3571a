"""Tiny real models and data with fixed seeds, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

VOCABULARY = 60


def tiny_bert(*, num_labels: int = 3, layers: int = 3, seed: int = 0, dropout: float = 0.0, **config: Any):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=num_labels,
            **config,
        )
    )


def tiny_llama(*, layers: int = 3, seed: int = 0, vocab_size: int = VOCABULARY, **config: Any):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            pad_token_id=0,
            **config,
        )
    )


def text_rows(count: int = 32, *, labels: int = 3, seed: int = 0) -> Dataset:
    """Token rows of 3 to 12 tokens whose label can be read off the first token; ``domain`` is an extra column."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 13, (1,), generator=generator))
        tokens = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": tokens,
                "attention_mask": [1] * length,
                "labels": tokens[0] % labels,
                "domain": int(length > 7),
            }
        )
    return Dataset.from_list(rows)


def language_rows(count: int = 32, *, seed: int = 0) -> Dataset:
    """Token rows of 3 to 12 tokens to continue, some of whose labels are masked."""
    rows = text_rows(count, seed=seed).remove_columns(["labels"])
    return rows.map(lambda row: {"labels": [-100 if token % 5 == 0 else token for token in row["input_ids"]]})


def teacher_rows(count: int = 32, *, seed: int = 0) -> Dataset:
    """``language_rows`` with 2 to 15 tokens of a teacher, 90 in its vocabulary, and 0 or more aligned positions."""
    generator = torch.Generator().manual_seed(seed)

    def ascending(length: int, count: int) -> list[int]:
        return sorted(torch.randperm(length, generator=generator)[:count].tolist())

    def add(row: dict[str, Any]) -> dict[str, Any]:
        length = int(torch.randint(2, 16, (1,), generator=generator))
        most = min(length, len(row["input_ids"]) - 1)
        aligned = int(torch.randint(0, most + 1, (1,), generator=generator))
        return {
            "teacher_input_ids": torch.randint(1, 90, (length,), generator=generator).tolist(),
            "aligned_student": ascending(len(row["input_ids"]) - 1, aligned),
            "aligned_teacher": ascending(length, aligned),
        }

    rows = [row | add(row) for row in language_rows(count, seed=seed).remove_columns(["domain"]).to_list()]
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right: labels with -100, everything else with 0."""
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim():
            batch[name] = pad_sequence(values, batch_first=True, padding_value=-100 if name == "labels" else 0)
        else:
            batch[name] = torch.stack(values)
    return batch


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Deterministic, silent, on the CPU."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})
