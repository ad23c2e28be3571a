"""What the labels of a data set are: their names in a stable order and the numbers a model learns them as."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.tasks import ProblemType, is_bio

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SHOWN = 8  # names listed in a message


@dataclass(frozen=True)
class Labels:
    """Reads one label: a value as the data set stores it, to what the model's loss takes.

    Args:
        problem_type: As in a model's configuration; ``None`` for one tag per token.
        names: Label names in the order of their ids; empty for regression.
        ids: Id by stored value; empty for regression.
        delimiter: Separates the labels of one text, where a text carries several.
        multi_hot: Whether several labels are stored as one 0 or 1 for each possible label.
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

    def encode(self, stored: Any) -> int | float | list[int] | list[float]:
        """The class id, the float, the 0.0 or 1.0 for each label, or the tag id of each token."""
        if self.problem_type == "regression":
            return float(stored)
        ids = [self.ids[value] for value in self.values(stored)]
        if self.problem_type == "single_label_classification":
            return ids[0]
        if self.problem_type == "multi_label_classification":
            return [float(position in ids) for position in range(len(self.names))]
        return ids


def read_labels(
    raw: DatasetDict, *, column: str = "label", problem_type: ProblemType | None = None, delimiter: str | None = None
) -> Labels:
    """Infer the labels from the ``train`` split and check every split against them.

    Texts, whole numbers and ``ClassLabel`` are classes; floats are regression; lists, or texts with a ``delimiter``, are
    several labels at once. Names are the ``ClassLabel``'s in its order, otherwise the sorted values of ``train``.

    Args:
        raw: The splits; ``train`` must be one.
        column: The column that holds the labels.
        problem_type: What the labels are, where it must not be inferred (whole numbers that are quantities).
        delimiter: Separates the labels of one text.

    Raises:
        ConfigurationError: Labels are missing, negative, not finite, of the wrong type, or all equal; or a split has
            labels that ``train`` has not.
    """
    kind = problem_type or _infer_problem_type(raw["train"], column, delimiter)
    for split, rows in raw.items():
        _check_complete(rows[column][:], split=split, column=column)
    if kind == "regression":
        for split, rows in raw.items():
            _check_numbers(rows[column][:], split=split, column=column)
        return Labels(kind)

    stored = raw["train"][column][:]
    several = isinstance(stored[0], list) or delimiter is not None
    if several != (kind == "multi_label_classification"):
        expected = "a list of labels, or data.delimiter" if not several else "one label"
        raise ConfigurationError(f"data: '{column}' holds {stored[0]!r}, but {kind} needs {expected} in each row.")
    labels = Labels(kind, delimiter=delimiter, multi_hot=several and delimiter is None and _is_multi_hot(stored))
    return _with_names(labels, raw, column)


def read_tags(raw: DatasetDict, *, column: str = "tags") -> Labels:
    """The tags of token classification, checked like `read_labels`.

    Names are the ``ClassLabel``'s in its order, otherwise ``O`` and then the sorted tags. Tags in BIO form are completed
    to a ``B-`` and an ``I-`` for each entity type, because ``I-`` of a rare type may miss in ``train``.
    """
    for split, rows in raw.items():
        _check_complete(rows[column][:], split=split, column=column)
    return _with_names(Labels(None), raw, column)


def _infer_problem_type(rows: Dataset, column: str, delimiter: str | None) -> ProblemType:
    from datasets import ClassLabel, Value

    feature = rows.features[column]
    if delimiter is not None:
        return "multi_label_classification"
    if isinstance(feature, ClassLabel):
        return "single_label_classification"
    if isinstance(feature, Value):
        return "regression" if feature.dtype.startswith("float") else "single_label_classification"
    return "multi_label_classification"


def _with_names(labels: Labels, raw: DatasetDict, column: str) -> Labels:
    """``labels`` with names and ids, after checking that no split has a value beyond those of ``train``."""
    declared = _declared_names(raw, column)
    found = {split: _count_values(labels, rows[column][:], declared, f"'{column}' of '{split}'") for split, rows in raw.items()}
    known = sorted(found["train"])
    if labels.problem_type is None and not declared:
        known = _complete_tags(known)
    for split, counts in found.items():
        if unknown := sorted(counts.keys() - set(known)):
            raise ConfigurationError(
                f"data: '{column}' of '{split}' has {_listed(_named(unknown, declared))} ({sum(map(counts.get, unknown))} "
                f"times), which 'train' never shows, so it cannot be learned. {nearest(unknown[0], known)}"
            )
    if len(found["train"]) < 2:
        raise ConfigurationError(
            f"data: '{column}' of 'train' is always {_listed(_named(known, declared))}; there is nothing to learn."
        )
    if declared:
        known = list(range(len(declared)))
    return replace(labels, names=_named(known, declared), ids={value: position for position, value in enumerate(known)})


def _declared_names(raw: DatasetDict, column: str) -> list[str]:
    """The names of a ``ClassLabel`` column, or of a column of lists of them; empty for any other."""
    names = {split: _class_names(rows.features[column]) for split, rows in raw.items()}
    for split, found in names.items():
        if found != names["train"]:
            raise ConfigurationError(
                f"data: '{column}' of '{split}' declares {_listed(found)}, but 'train' {_listed(names['train'])}; ids would not mean the same."
            )
    return names["train"]


def _class_names(feature: Any) -> list[str]:
    return list(getattr(getattr(feature, "feature", feature), "names", []))


def _count_values(labels: Labels, stored: Sequence[Any], declared: Sequence[str], where: str) -> Counter:
    counts = Counter(value for each in stored for value in labels.values(each))
    for value in counts:
        if not isinstance(value, (str, int)) and not (isinstance(value, float) and value.is_integer()):
            raise ConfigurationError(f"data: {where} has {value!r}; expected a text or a whole number for each class.")
        if not isinstance(value, str) and (value < 0 or (declared and value >= len(declared))):
            expected = f"ids 0 to {len(declared) - 1} ({_listed(declared)})" if declared else "ids from 0"
            raise ConfigurationError(
                f"data: {where} has {value} ({counts[value]} times); expected {expected}. -1 marks a label that was withheld."
            )
    return counts


def _complete_tags(tags: list[Any]) -> list[Any]:
    """BIO tags with ``O`` first and both prefixes for every type; any other tags as they are."""
    if not all(isinstance(tag, str) for tag in tags) or not is_bio(tags):
        return tags
    kinds = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def _is_multi_hot(stored: Sequence[list[Any]]) -> bool:
    """Rows of zeros and ones of one length are flags; as ids they would all be the same few labels."""
    lengths = {len(row) for row in stored}
    return len(lengths) == 1 and min(lengths) > 1 and {value for row in stored for value in row} <= {0, 1}


def _check_complete(stored: Sequence[Any], *, split: str, column: str) -> None:
    missing = [row for row, value in enumerate(stored) if _is_missing(value)]
    if missing:
        raise ConfigurationError(
            f"data: '{column}' is missing in {len(missing)} of {len(stored)} rows of '{split}' (first in row {missing[0]})."
        )


def _is_missing(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_numbers(stored: Sequence[Any], *, split: str, column: str) -> None:
    for row, value in enumerate(stored):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigurationError(
                f"data: '{column}' is {value!r} in row {row} of '{split}'; regression needs a finite number."
            )


def _named(values: Iterable[Any], declared: Sequence[str]) -> list[str]:
    return [declared[value] if declared else f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown or "nothing"
