"""A labelled source and an unlabelled target as one data set: one item has an example of each domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_transfer.batches import EXAMPLE_INDEX
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.tasks import IGNORED

DOMAIN = "domain"
"""The column of a collated batch that tells where a row is from: 0, 1, ... the sources, the last the target."""

LABELS = ("labels", "label", "label_ids")

Row = Mapping[str, Any]


class DomainPair(tuple[Row, ...]):
    """One example of every domain, the target's last."""

    __slots__ = ()


class DomainPairs(Dataset[DomainPair]):
    """Source and target side by side, so that every batch, on every rank, holds as much of each domain.

    An epoch goes once through the largest domain. Smaller ones start over as often as that takes, each time in another
    order, which is a function of seed, epoch and turn: a resumed run meets the same pairs. A batch size counts pairs:
    a batch has that many rows of each domain.

    The target's labels are dropped here, before anything could read them.

    Args:
        source: Labelled examples, or a list of such, one per source domain. A ``datasets.Dataset``, or anything that
            has a length and rows that are mappings.
        target: Examples of the target domain, with the same columns; labels may be there or not.
        seed: Of the orders in which smaller domains start over.

    Raises:
        ConfigurationError: A domain is missing, empty or a stream (``DomainStream`` takes those), or the domains
            differ in a column beside labels.

    Example:
        >>> pairs = DomainPairs(source=[{"x": 1, "label": 0}, {"x": 2, "label": 1}], target=[{"x": 3}])
        >>> len(pairs), pairs[1]
        (2, ({'x': 2, 'label': 1}, {'x': 3}))
    """

    def __init__(self, source: Any, target: Any, *, seed: int = 0) -> None:
        self.rows = _domains(source, target)
        for name, rows in self.rows.items():
            if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
                raise ConfigurationError(
                    f"{name}: expected rows with a length, found {type(rows).__name__}. DomainStream takes streams."
                )
            if not len(rows):
                raise ConfigurationError(f"{name}: it has no examples.")
        _check_columns({name: set(rows[0]) for name, rows in self.rows.items()})
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # for the loader's worker processes
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._ordered_for = 0

    @property
    def domains(self) -> int:
        """How many there are, the target included."""
        return len(self.rows)

    def __len__(self) -> int:
        return max(map(len, self.rows.values()))

    def __getitem__(self, index: int) -> DomainPair:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[DomainPair]:
        """Many at once, as data loaders ask: a ``datasets.Dataset`` reads them together."""
        beyond = [index for index in indices if not 0 <= index < len(self)]
        if beyond:
            raise IndexError(f"pair {beyond[0]} of {len(self)}")
        columns = []
        for number, rows in enumerate(self.rows.values()):
            places = [self._place(number, len(rows), index) for index in indices]
            together = getattr(rows, "__getitems__", None)
            columns.append(together(places) if together else [rows[place] for place in places])
        return [_pair(list(rows)) for rows in zip(*columns, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Pair anew; ``TransferTrainer`` calls it, because the Trainer's loader tells its sampler alone."""
        self._epoch.fill_(epoch)

    def indexed(self) -> tuple[DomainPairs, datasets.Dataset]:
        """The same pairs of rows that are numbered (``example_index``), and these rows, one domain after the other.

        Raises:
            ConfigurationError: A domain is no ``datasets.Dataset``.
        """
        numbered: list[datasets.Dataset] = []
        for name, rows in self.rows.items():
            if not isinstance(rows, datasets.Dataset):
                raise ConfigurationError(f"{name}: expected a datasets.Dataset, found {type(rows).__name__}.")
            first = sum(map(len, numbered))
            numbered.append(rows.add_column(EXAMPLE_INDEX, list(range(first, first + len(rows)))))  # type: ignore[call-arg]
        shared = numbered[-1].column_names  # the sources have labels beside these
        joined = datasets.concatenate_datasets([rows.select_columns(shared) for rows in numbered])
        pairs = DomainPairs(numbered[:-1], numbered[-1], seed=self.seed)
        pairs._epoch = self._epoch
        return pairs, joined

    def _place(self, number: int, size: int, index: int) -> int:
        """The row of domain ``number`` that pair ``index`` has."""
        if size == len(self):
            return index
        turn, place = divmod(index, size)
        epoch = int(self._epoch)
        if epoch != self._ordered_for:
            self._orders, self._ordered_for = {}, epoch
        if (number, turn) not in self._orders:
            self._orders[number, turn] = np.random.default_rng([self.seed, epoch, number, turn]).permutation(size)
        return int(self._orders[number, turn][place])


class DomainStream(IterableDataset[DomainPair]):
    """``DomainPairs`` of streams: the shorter start over until each has come to its end once.

    A stream that starts over is told so by ``set_epoch``, so that a shuffled ``datasets.IterableDataset`` comes in
    another order. How many pairs there are is not known: training needs ``max_steps``.

    Args:
        source: A stream of labelled examples, or a list of such.
        target: A stream of examples of the target domain.

    Raises:
        ConfigurationError: A domain is missing; on reading, one is empty or differs in a column beside labels, or
            workers read it.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self.rows = _domains(source, target)
        self._epoch = 0

    @property
    def domains(self) -> int:
        """How many there are, the target included."""
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Start the streams in other orders; the data loader calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[DomainPair]:
        if get_worker_info() is not None:
            raise ConfigurationError("DomainStream is read in the main process: set dataloader_num_workers to 0.")
        turns = dict.fromkeys(self.rows, 0)
        streams = {name: self._begin(name, 0) for name in self.rows}
        checked = False
        while True:
            rows = []
            for name in self.rows:
                row = next(streams[name], None)
                if row is None:
                    turns[name] += 1
                    if all(turns.values()):
                        return
                    streams[name] = self._begin(name, turns[name])
                    row = next(streams[name], None)
                if row is None:
                    raise ConfigurationError(f"{name}: it has no examples.")
                rows.append(row)
            if not checked:
                _check_columns({name: set(row) for name, row in zip(self.rows, rows, strict=True)})
                checked = True
            yield _pair(rows)

    def _begin(self, name: str, turn: int) -> Iterator[Row]:
        stream = self.rows[name]
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(1000 * self._epoch + turn)
        return iter(stream)


class DomainCollator:
    """One batch of pairs: the rows pair by pair, so that any cut between pairs holds as much of each domain.

    The batch gets the column ``domain`` (N,), and its target rows get the label -100 everywhere. Rows that are no
    pairs are left to ``collator`` alone.

    Args:
        collator: Makes a batch of rows; it is given a source label in the target's place, for it may need one.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> Mapping[str, Any]:
        if not isinstance(examples[0], DomainPair):
            return self.collator(list(examples))
        rows = [{**_stand_ins(pair[0], row), **row} for pair in examples for row in pair]
        batch = dict(self.collator(rows))
        domains = len(examples[0])
        domain = torch.arange(domains).repeat(len(examples))
        for name in (name for name in LABELS if name in batch):
            if not isinstance(batch[name], Tensor):
                raise ConfigurationError(
                    f"{name}: found {type(batch[name]).__name__} in a batch, expected one tensor."
                )
            batch[name][domain == domains - 1] = IGNORED
        return {**batch, DOMAIN: domain}


def _domains(source: Any, target: Any) -> dict[str, Any]:
    """Every domain by name, the target without its labels."""
    sources = list(source) if isinstance(source, (list, tuple)) and not _is_row(source) else [source]
    if not sources or source is None:
        raise ConfigurationError("source is missing: expected labelled examples, or a list of such.")
    if target is None:
        raise ConfigurationError("target is missing: expected examples of the domain to adapt to, labelled or not.")
    if isinstance(target, (datasets.Dataset, datasets.IterableDataset)):
        target = target.remove_columns([name for name in LABELS if name in (target.column_names or ())])
    names = ["source"] if len(sources) == 1 else [f"source[{number}]" for number in range(len(sources))]
    return {**dict(zip(names, sources, strict=True)), "target": target}


def _is_row(rows: Sequence[Any]) -> bool:
    """Whether these are the rows of one domain, rather than domains."""
    return bool(rows) and isinstance(rows[0], Mapping)


def _pair(rows: list[Row]) -> DomainPair:
    hidden = [{DOMAIN}] * (len(rows) - 1) + [{DOMAIN, *LABELS}]
    return DomainPair(
        {name: row[name] for name in row if name not in left} for row, left in zip(rows, hidden, strict=True)
    )


def _stand_ins(source: Row, row: Row) -> dict[str, Any]:
    """Labels for a row without: the source's; of tokens, as many as the row has."""
    labels = {name: source[name] for name in LABELS if name in source}
    if "input_ids" in source:
        for name, values in [(name, torch.as_tensor(label)) for name, label in labels.items()]:
            if values.shape == (len(source["input_ids"]),) and not values.is_floating_point():
                labels[name] = [IGNORED] * len(row["input_ids"])
    return labels


def _check_columns(columns: Mapping[str, set[str]]) -> None:
    columns = {name: found - {DOMAIN} for name, found in columns.items()}
    expected = columns["target"] - set(LABELS)
    for name, found in columns.items():
        if missing := sorted(expected - found) or sorted(found - expected - set(LABELS)):
            where, other = (name, found) if missing[0] in expected else ("target", expected)
            raise ConfigurationError(
                f"{where}: it has no column '{missing[0]}', which another domain has. {nearest(missing[0], other)}"
            )
    unlabelled = [name for name, found in columns.items() if name != "target" and not found & set(LABELS)]
    if unlabelled and any(found & set(LABELS) for name, found in columns.items() if name != "target"):
        raise ConfigurationError(f"{unlabelled[0]}: it has no labels, which another source has.")
