"""Whether raw examples can be used at all, found out before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test", "unlabelled")
ROLES: dict[str, tuple[str, ...]] = {  # the columns each task reads; of these, OPTIONAL ones may be absent
    "sequence-classification": ("text", "text_pair", "label"),
    "token-classification": ("tokens", "tags"),
    "causal-lm": ("text",),
    "image-classification": ("image", "label"),
    "audio-classification": ("audio", "label"),
}
OPTIONAL = ("text_pair",)


def roles_of(split: str, task: str) -> tuple[str, ...]:
    """The columns that ``task`` reads in ``split``."""
    return tuple(role for role in ROLES[task] if split != "unlabelled" or role != "label")


def checked_splits(raw: Mapping[str, Dataset], *, task: str) -> dict[str, Dataset]:
    """The splits in order, each with rows, the columns of ``task``, and a text in every row.

    A language model's documents may be blank (they are skipped); a blank example is refused.

    Raises:
        ConfigurationError: ``train`` is missing, a split is empty or not one of `SPLITS`, a column or a text is not
            there, or tags do not match their words.
    """
    for split in ("train", *raw):
        if split not in SPLITS or split not in raw:
            raise ConfigurationError(
                f"data: found the splits {', '.join(raw)}; expected train, and beside it only {', '.join(SPLITS[1:])}."
            )
    splits = {split: raw[split] for split in SPLITS if split in raw}
    for split, rows in splits.items():
        if not len(rows):
            raise ConfigurationError(f"data: '{split}' is empty.")
        for role in roles_of(split, task):
            if role in rows.column_names:
                _check_texts(rows, role, split, may_be_blank=task == "causal-lm")
            elif role not in OPTIONAL:
                raise ConfigurationError(f"data: '{split}' has no column '{role}'. {nearest(role, rows.column_names)}")
        if "tags" in ROLES[task]:
            _check_aligned(rows, split)
    return splits


def texts_of(rows: Dataset) -> list[tuple[str, ...]]:
    """What the model reads of each row: one text, two, or its words."""
    if "tokens" in rows.column_names:
        return [tuple(words) for words in rows["tokens"][:]]
    return list(zip(*(rows[role][:] for role in ("text", "text_pair") if role in rows.column_names), strict=True))


def is_withheld(rows: Dataset) -> bool:
    """Whether a benchmark gives these rows without their labels: each is -1 or missing."""
    return "label" in rows.column_names and all(label in (-1, None) for label in rows["label"][:])


def _check_texts(rows: Dataset, role: str, split: str, *, may_be_blank: bool) -> None:
    def is_text(value: Any) -> bool:
        return isinstance(value, str) and (may_be_blank or bool(value.strip()))

    def are_words(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)

    usable = {"text": is_text, "text_pair": is_text, "tokens": are_words}.get(role)
    if usable is None:
        return
    values = rows[role][:]
    bad = [row for row, value in enumerate(values) if not usable(value)]
    if bad:
        expected = "a list of words" if role == "tokens" else "a text"
        raise ConfigurationError(
            f"data: '{role}' is not {expected} in {len(bad):,} of {len(values):,} rows of '{split}' "
            f"(first in row {bad[0]}: {values[bad[0]]!r})."
        )


def _check_aligned(rows: Dataset, split: str) -> None:
    for row, (words, tags) in enumerate(zip(rows["tokens"][:], rows["tags"][:], strict=True)):
        if not isinstance(tags, list) or len(tags) != len(words):
            found = len(tags) if isinstance(tags, list) else repr(tags)
            raise ConfigurationError(f"data: row {row} of '{split}' has {len(words)} words, but tags {found}.")
