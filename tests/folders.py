"""Tiny models, tokenizers and data files on disk, as recipes name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY, tiny_bert, tiny_llama

WORDS = ["bad", "good", "dull", "fine", "book", "film", "a", "the", "was", "is", "plot", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_tokenizer(folder: Path, *, max_length: int = 32) -> None:
    words = SPECIAL + WORDS + [f"word{index}" for index in range(VOCABULARY - len(SPECIAL) - len(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, eos_token="[SEP]", **names)
    fast.save_pretrained(folder)


def write_encoder(folder: Path, **config: Any) -> Path:
    """A BERT without a head, as a pretrained checkpoint is."""
    tiny_bert(**config).bert.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_classifier(folder: Path, **config: Any) -> Path:
    """A BERT that was trained for the labels of ``sentiment_rows``."""
    model = tiny_bert(num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_decoder(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    write_tokenizer(folder, max_length=64)
    return folder


def sentiment_rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Distinct sentences whose label is the word they turn on."""
    rows = []
    for index in range(start, start + count):
        label = index % 2
        rows.append(
            {"text": f"the {WORDS[4 + index % 3]} was word{index % 40} {WORDS[label]}", "label": ["no", "yes"][label]}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sentiment(folder: Path, *, train: int = 32) -> dict[str, str]:
    """The three splits as JSON lines; returns ``data_files``."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "validation": 8, "test": 8}
    return {
        split: str(write_rows(folder / f"{split}.jsonl", sentiment_rows(size, start=100 * place)))
        for place, (split, size) in enumerate(sizes.items())
    }
