"""What the labels of a data set are: their names in a stable order, and the numbers a model learns them as."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import ProblemType, is_bio

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 8  # names listed in a message


@dataclass(frozen=True)
class Labels:
    """Reads one label: from what the data set stores to what the model's loss takes.

    Args:
        problem_type: As in a model's configuration; ``None`` for one tag per word.
        names: Label names in the order of their ids; empty for regression.
        ids: Id by stored value; empty for regression.
        delimiter: Separates the labels of one text, where a text carries several.
        multi_hot: Whether several labels are stored as a 0 or 1 for each possible label.
    """

    problem_type: ProblemType | None
    names: list[str] = field(default_factory=list)
    ids: dict[Any, int] = field(default_factory=dict)
    delimiter: str | None = None
    multi_hot: bool = False

    def values(self, stored: Any) -> list[Any]:
        """The single values in a stored label."""
        if self.multi_hot:
            return [position for position, present in enumerate(stored) if present]
        if self.delimiter is not None:
            return [part.strip() for part in stored.split(self.delimiter) if part.strip()]
        return stored if isinstance(stored, list) else [stored]

    def encode(self, stored: Any) -> Any:
        """A class id, a float, a 0.0 or 1.0 for each label, or an id for each word."""
        if self.problem_type == "regression":
            return float(stored)
        ids = [self.ids[value] for value in self.values(stored)]
        if self.problem_type == "single_label_classification":
            return ids[0]
        if self.problem_type == "multi_label_classification":
            return [float(label in ids) for label in range(len(self.names))]
        return ids


def read_labels(
    splits: Mapping[str, Dataset], *, problem_type: ProblemType | None = None, delimiter: str | None = None
) -> Labels:
    """Infer what the column ``label`` holds from the ``train`` split, and check every split against it.

    Names are those of a ``ClassLabel`` in its order, otherwise the sorted values of ``train``.

    Args:
        splits: ``train`` and any others.
        problem_type: What the labels are, where `infer_problem_type` would be wrong.
        delimiter: Separates the labels of one text.

    Raises:
        ConfigurationError: Labels are missing, negative, not finite, of the wrong type or all the same, or a split has
            labels that ``train`` has not.
    """
    kind = problem_type or infer_problem_type(splits["train"], delimiter=delimiter)
    for split, rows in splits.items():
        _check_complete(rows["label"][:], f"'label' of '{split}'")
    stored = splits["train"]["label"][:]
    several = isinstance(stored[0], list) or delimiter is not None
    if several != (kind == "multi_label_classification") or (delimiter is not None and not isinstance(stored[0], str)):
        raise ConfigurationError(
            f"data: 'label' holds {stored[0]!r}, which is no label for {kind} with data.delimiter {delimiter!r}. "
            "Several labels are a list, or a text with a delimiter."
        )
    if kind == "regression":
        for split, rows in splits.items():
            _check_numbers(rows["label"][:], split)
        return Labels(kind)
    multi_hot = several and delimiter is None and _is_multi_hot(stored)
    return _with_names(Labels(kind, delimiter=delimiter, multi_hot=multi_hot), splits, "label")


def read_tags(splits: Mapping[str, Dataset]) -> Labels:
    """The same for the column ``tags``, a list with one tag for each word.

    Because ``I-`` of a rare type may be missing in ``train``, every tag that is declared is known, and where none are,
    tags in BIO form get both prefixes for each type, after ``O``.
    """
    for split, rows in splits.items():
        _check_complete(rows["tags"][:], f"'tags' of '{split}'")
    return _with_names(Labels(None), splits, "tags")


def infer_problem_type(rows: Dataset, *, delimiter: str | None) -> ProblemType:
    """Floats are regression; lists, and texts with a delimiter, are several labels; anything else is one class."""
    from datasets import ClassLabel, Value

    feature = rows.features["label"]
    if delimiter is not None or not isinstance(feature, (ClassLabel, Value)):
        return "multi_label_classification"
    return "regression" if feature.dtype.startswith("float") else "single_label_classification"


def unseen_labels(splits: Mapping[str, Dataset], labels: Labels) -> list[str]:
    """One note for each split in which some classes never occur: its macro scores do not cover them."""
    notes = []
    for split, rows in splits.items() if labels.names else ():
        seen = {labels.ids[value] for stored in rows["label"][:] for value in labels.values(stored)}
        if unseen := [name for position, name in enumerate(labels.names) if position not in seen]:
            count = f"{len(unseen)} of {len(labels.names)} labels"
            notes.append(f"note: {split} has no example of {count}: {_listed(unseen)}")
    return notes


def _with_names(labels: Labels, splits: Mapping[str, Dataset], column: str) -> Labels:
    """``labels`` with names and ids, after checking that no split has a value beyond those of ``train``."""
    declared = _declared_names(splits, column)
    found = {
        split: _count_values(labels, rows[column][:], declared, f"'{column}' of '{split}'")
        for split, rows in splits.items()
    }
    known = sorted(found["train"])
    if len(known) < 2:
        raise ConfigurationError(
            f"data: '{column}' of 'train' is always {_listed(_named(known, declared))}: there is nothing to learn."
        )
    if column == "tags":
        known = list(range(len(declared))) if declared else _completed_tags(known)
    for split, counts in found.items():
        if unknown := sorted(counts.keys() - set(known)):
            raise ConfigurationError(
                f"data: '{column}' of '{split}' has {_listed(_named(unknown, declared))} "
                f"({sum(counts[value] for value in unknown)} times), which 'train' never shows: it cannot be learned."
            )
    ids = range(len(declared)) if declared else known
    return replace(labels, names=_named(ids, declared), ids={value: position for position, value in enumerate(ids)})


def _declared_names(splits: Mapping[str, Dataset], column: str) -> list[str]:
    """The names of a ``ClassLabel`` column, or of a column of lists of them; empty for any other."""

    def declared(rows: Dataset) -> list[str]:
        feature = rows.features[column]
        return list(getattr(getattr(feature, "feature", feature), "names", None) or [])

    names = declared(splits["train"])
    for split, rows in splits.items():
        if declared(rows) != names:
            raise ConfigurationError(
                f"data: '{column}' means {_listed(names)} in 'train', but {_listed(declared(rows))} in '{split}'."
            )
    return names


def _count_values(labels: Labels, stored: Sequence[Any], declared: Sequence[str], where: str) -> Counter[Any]:
    counts = Counter(value for each in stored for value in labels.values(each))
    for value, count in counts.items():
        if not (isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer())):
            raise ConfigurationError(f"data: {where} has {value!r}; a class is a text or a whole number.")
        if not isinstance(value, str) and (value < 0 or (declared and value >= len(declared))):
            expected = f"0 to {len(declared) - 1} ({_listed(declared)})" if declared else "0 or more"
            raise ConfigurationError(
                f"data: {where} has the id {value} ({count} times); expected {expected}. -1 often means: withheld."
            )
    return counts


def _completed_tags(tags: list[Any]) -> list[Any]:
    if not all(isinstance(tag, str) for tag in tags) or not is_bio(tags):
        return tags
    kinds = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def _is_multi_hot(stored: Sequence[list[Any]]) -> bool:
    """Rows of zeros and ones of one length are flags: read as ids, all rows would have nearly the same labels."""
    lengths = {len(row) for row in stored}
    return len(lengths) == 1 and min(lengths) > 1 and {value for row in stored for value in row} <= {0, 1}


def _check_complete(stored: Sequence[Any], where: str) -> None:
    missing = [row for row, value in enumerate(stored) if _is_missing(value)]
    if missing:
        raise ConfigurationError(
            f"data: {where} is missing in {len(missing):,} of {len(stored):,} rows (first in row {missing[0]})."
        )


def _is_missing(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_numbers(stored: Sequence[Any], split: str) -> None:
    for row, value in enumerate(stored):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigurationError(
                f"data: 'label' of '{split}' is {value!r} in row {row}; regression needs a finite number."
            )


def _named(values: Iterable[Any], declared: Sequence[str]) -> list[str]:
    if declared:
        return [declared[value] for value in values]
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN]) or "no names"
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
