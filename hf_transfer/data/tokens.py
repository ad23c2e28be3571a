"""Texts to rows of token ids, with a count of what each row keeps and loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer.data.labels import Labels
from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, list[Any]]
KEPT, LOST = "_kept", "_lost"


def tokenise(
    rows: Dataset, function: Callable[..., Columns], *, name: str, settings: Mapping[str, Any]
) -> tuple[Dataset, dict[str, int]]:
    """Map ``function`` over ``rows``; the result holds only its columns, the counts are summed.

    Args:
        rows: The raw rows of one split.
        function: One of the functions below: a batch of columns in, columns out with ``KEPT`` and ``LOST`` per row.
        name: The split's name.
        settings: The keyword arguments of ``function``.

    Raises:
        ConfigurationError: No row is left.
    """
    done = rows.map(
        function, batched=True, remove_columns=rows.column_names, fn_kwargs=dict(settings), desc=f"Tokenising {name}"
    )
    if not len(done):
        raise ConfigurationError(f"data: no text of '{name}' is long enough to learn from.")
    kept, lost = np.asarray(done[KEPT][:]), np.asarray(done[LOST][:])
    counts = {"rows": len(done), "kept": int(kept.sum()), "lost": int(lost.sum()), "truncated": int((lost > 0).sum())}
    return done.remove_columns([KEPT, LOST]), counts


def sequences(batch: Columns, *, tokenizer: PreTrainedTokenizerBase, length: int, labels: Labels) -> Columns:
    """One text, or a pair, to one row cut to ``length`` tokens; its label is -100 where it has none."""
    texts = [batch[role] for role in ("text", "text_pair") if role in batch]
    encoded = tokenizer(*texts, verbose=False)
    full = [len(ids) for ids in encoded["input_ids"]]
    if max(full) > length:
        encoded = tokenizer(*texts, truncation=True, max_length=length)
    kept = [len(ids) for ids in encoded["input_ids"]]
    lost = [before - after for before, after in zip(full, kept, strict=True)]
    encodings = [labels.encode(label) for label in batch["label"]] if "label" in batch else [IGNORED] * len(kept)
    return {**encoded, "labels": encodings, KEPT: kept, LOST: lost}


def tagged_words(batch: Columns, *, tokenizer: PreTrainedTokenizerBase, length: int, labels: Labels) -> Columns:
    """A sentence of tagged words to one row: a word's first piece carries its tag, all other pieces -100.

    Counts are of words, since a word without its first piece is neither trained nor scored.
    """
    encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=length)
    rows, kept = [], []
    for position, tags in enumerate(batch["tags"]):
        ids, words = labels.encode(tags), encoded.word_ids(position)
        first = [word is not None and word != before for before, word in pairwise([None, *words])]
        rows.append([ids[word] if opens else IGNORED for opens, word in zip(first, words, strict=True)])
        kept.append(sum(first))
    lost = [len(tags) - count for tags, count in zip(batch["tags"], kept, strict=True)]
    return {**encoded, "labels": rows, KEPT: kept, LOST: lost}


def documents(batch: Columns, *, tokenizer: PreTrainedTokenizerBase, length: int) -> Columns:
    """One document to one row cut to ``length`` tokens; one with nothing to predict is left out."""
    full = [ids for ids in _document_ids(batch["text"], tokenizer) if len(ids) > 1]
    rows = [ids[:length] for ids in full]
    lost = [len(before) - len(after) for before, after in zip(full, rows, strict=True)]
    return _language_rows(rows) | {LOST: lost}


def blocks(batch: Columns, *, tokenizer: PreTrainedTokenizerBase, length: int) -> Columns:
    """Documents joined and cut into blocks of ``length`` tokens; the last block of a batch of documents is shorter."""
    joined = list(chain.from_iterable(_document_ids(batch["text"], tokenizer)))
    rows = [joined[start : start + length] for start in range(0, len(joined) - 1, length)]
    lost = len(joined) - sum(map(len, rows))  # a last token alone, with nothing to predict
    return _language_rows(rows) | {LOST: [lost if row is rows[-1] else 0 for row in rows]}


def document_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What closes a document so that the model sees where it ends: nothing where the tokenizer marks documents itself,
    else its end-of-text token (GPT-2, Qwen)."""
    marks_documents = bool(tokenizer("")["input_ids"])
    return [] if marks_documents or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _document_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Documents with their ends marked. Blank texts are left out."""
    end = document_end(tokenizer)
    texts = [text for text in texts if text.strip()]
    return [ids + end for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []


def _language_rows(rows: list[list[int]]) -> Columns:
    return {"input_ids": rows, "labels": rows, KEPT: [len(row) for row in rows]}
