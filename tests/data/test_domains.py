"""Pairs of domains: sizes, orders, columns, and labels that nobody reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from hf_transfer.data.domains import DomainCollator, DomainPairs, DomainStream
from hf_transfer.errors import ConfigurationError
from tests.tiny import collate


def rows(numbers, *, labels: bool = True) -> Dataset:
    columns = {"input_ids": [[number, number] for number in numbers]}
    return Dataset.from_dict(columns | ({"labels": [number % 2 for number in numbers]} if labels else {}))


def numbers_of(pairs) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"][0] for row in pairs[index]) for index in range(len(pairs))]


def test_an_epoch_goes_once_through_the_largest_and_evenly_through_the_others():
    pairs = DomainPairs([rows(range(3)), rows(range(10, 17))], rows(range(20, 22)))
    assert (len(pairs), pairs.domains) == (7, 3)
    first, second, target = zip(*numbers_of(pairs), strict=True)
    assert second == tuple(range(10, 17))
    assert sorted(Counter(first).values()) == [2, 2, 3]
    assert sorted(Counter(target).values()) == [3, 4]
    assert sorted(first[:3]) == sorted(first[3:6]) == [0, 1, 2]


def test_epochs_pair_anew_and_a_resumed_run_meets_the_same_pairs():
    pairs, again = (DomainPairs(rows(range(30)), rows(range(30, 40)), seed=3) for _ in range(2))
    epochs = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        epochs.append(numbers_of(pairs))
    assert epochs[0] != epochs[1] != epochs[2]
    again.set_epoch(2)
    assert [numbers_of(again)[index] for index in (20, 3)] == [epochs[2][index] for index in (20, 3)]
    assert numbers_of(DomainPairs(rows(range(30)), rows(range(30, 40)), seed=4)) != epochs[0]


def test_worker_processes_see_the_epoch():
    pairs = DomainPairs(rows(range(12)), rows(range(20, 24)))
    loader = DataLoader(pairs, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=list)
    epochs = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        epochs.append([pair for batch in loader for pair in batch])
    assert epochs[0] != epochs[1]
    assert [pairs[index] for index in range(12)] == epochs[1]


def test_a_batch_holds_the_domains_in_turn_and_labels_of_the_sources_alone():
    pairs = DomainPairs([rows(range(4)), rows(range(10, 14))], rows(range(20, 24), labels=False))
    batch = DomainCollator(collate)([pairs[0], pairs[1]])
    assert batch["input_ids"][:, 0].tolist()[::3] == [0, 1]
    assert batch["domain"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["labels"].tolist() == [0, 0, -100, 1, 1, -100]


def test_labels_of_every_token_and_float_labels():
    source = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, -100, 0]]})
    target = Dataset.from_dict({"input_ids": [[4, 5]]})
    batch = DomainCollator(collate)([DomainPairs(source, target)[0]])
    assert batch["labels"].tolist() == [[1, -100, 0], [-100, -100, -100]]
    numbers = source.remove_columns("labels").add_column("labels", [0.25])
    assert DomainCollator(collate)([DomainPairs(numbers, target)[0]])["labels"].tolist() == [0.25, -100.0]


def test_target_labels_are_never_read():
    """Labels that would raise when read: columns of a data set, and rows that are made on the fly."""

    class Poisoned(dict):
        def __getitem__(self, name):
            assert name != "labels"
            return super().__getitem__(name)

        def items(self):
            raise AssertionError("all items, labels among them")

    class Rows(list):
        pass

    source, target = rows(range(4)), rows(range(20, 24))
    assert "labels" not in DomainPairs(source, target).rows["target"].column_names
    made = Rows(Poisoned(row) for row in target)
    pair = DomainPairs(list(source), made)[1]
    assert pair[1] == {"input_ids": [21, 21]}


def test_other_rows_are_the_collators_own():
    plain = [{"input_ids": [1], "labels": 0}]
    assert DomainCollator(lambda examples: {"got": examples})(plain) == {"got": plain}


def stream(numbers) -> IterableDataset:
    return rows(numbers).to_iterable_dataset().shuffle(seed=0, buffer_size=100)


def test_streams_start_over_until_each_has_ended_once():
    pairs = DomainStream(stream(range(7)), stream(range(20, 23)))
    numbers = [tuple(row["input_ids"][0] for row in pair) for pair in pairs]
    assert sorted(source for source, _ in numbers) == list(range(7))
    targets = [target for _, target in numbers]
    assert sorted(targets[:3]) == sorted(targets[3:6]) == [20, 21, 22]
    assert all("labels" not in target for _, target in pairs)
    pairs.set_epoch(1)
    assert [tuple(row["input_ids"][0] for row in pair) for pair in pairs] != numbers


def test_numbered_rows_are_those_of_the_pairs():
    pairs = DomainPairs(rows(range(3)), rows(range(20, 25)))
    numbered, joined = pairs.indexed()
    assert joined["input_ids"][:] == [[number] * 2 for number in (*range(3), *range(20, 25))]
    assert "labels" not in joined.column_names
    numbered.set_epoch(1)
    for index in range(5):
        assert [joined[row["example_index"]]["input_ids"] for row in numbered[index]] == [
            row["input_ids"] for row in numbered[index]
        ]
    with pytest.raises(ConfigurationError, match="source: expected a datasets.Dataset, found list"):
        DomainPairs(list(rows(range(3))), rows(range(3))).indexed()


WRONG = {
    "no target": (lambda: DomainPairs(rows(range(3)), None), "target is missing"),
    "no source": (lambda: DomainPairs([], rows(range(3))), "source is missing"),
    "empty": (lambda: DomainPairs(rows(range(3)), rows([])), "target: it has no examples"),
    "a stream": (lambda: DomainPairs(stream(range(3)), rows(range(3))), "source: expected rows with a length"),
    "columns": (
        lambda: DomainPairs(rows(range(3)), rows(range(3)).rename_column("input_ids", "inputs_ids")),
        "source: it has no column 'inputs_ids', which another domain has. Did you mean 'input_ids'",
    ),
    "more columns": (
        lambda: DomainPairs(rows(range(3)).add_column("token_type_ids", [[0, 0]] * 3), rows(range(3))),
        "target: it has no column 'token_type_ids'",
    ),
    "labels of one source": (
        lambda: DomainPairs([rows(range(3)), rows(range(3), labels=False)], rows(range(3))),
        r"source\[1\]: it has no labels",
    ),
    "an empty stream": (lambda: list(DomainStream(stream(range(3)), iter([]))), "target: it has no examples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named(name):
    make, message = WRONG[name]
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_column_that_is_called_domain_is_no_ones_but_ours():
    source = rows(range(3)).add_column("domain", ["books"] * 3)
    pair = DomainPairs(source, rows(range(3)))[0]
    assert all("domain" not in row for row in pair)
    assert DomainCollator(collate)([pair])["domain"].tolist() == [0, 1]


def test_labels_that_are_no_tensor_are_refused():
    """Boxes of objects: the target would keep the source's."""
    pairs = DomainPairs([{"x": 1, "labels": {"boxes": [1]}}], [{"x": 2}])
    with pytest.raises(ConfigurationError, match="labels: found list in a batch, expected one tensor"):
        DomainCollator(lambda rows: {"labels": [row["labels"] for row in rows]})([pairs[0]])


def test_a_stream_is_not_read_by_workers():
    pairs = DomainStream(stream(range(4)), stream(range(4)))
    with pytest.raises(ConfigurationError, match="set dataloader_num_workers to 0"):
        list(DataLoader(pairs, batch_size=2, num_workers=2, collate_fn=list))


def test_pairs_index_like_a_list():
    with pytest.raises(IndexError):
        DomainPairs(rows(range(3)), rows(range(3)))[3]
    assert torch.equal(DomainCollator(collate)([DomainPairs(rows([5]), rows([6]))[0]])["domain"], torch.tensor([0, 1]))
