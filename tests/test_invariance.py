"""However a step's examples are cut into micro-batches and ranks, the gradient is that of the whole step."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from tests.launched import CASES, COUPLED, Recorder, launch, record_of, train
from tests.tiny import arguments, collate, text_rows, tiny_bert

STEP = 8


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], prefix: str) -> float:
    """Relative distance of all tensors under ``prefix``; the same names must be there."""
    names = sorted(name for name in one if name.startswith(prefix))
    assert names
    assert names == sorted(name for name in other if name.startswith(prefix))
    first, second = (torch.cat([record[name].flatten() for name in names]) for record in (one, other))
    return ((first - second).norm() / first.norm()).item()


def assert_same_run(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert distance(one, other, "0/") < 1e-6  # the first step: before rounding can feed back through the weights
    assert distance(one, other, "3/") < 1e-4
    assert distance(one, other, "final/") < 1e-5
    assert distance(one, other, "loss/") < 1e-5
    if any(name.startswith("scaffold/") for name in one):
        assert distance(one, other, "scaffold/") < 1e-5


SEPARABLE = sorted(set(CASES) - set(COUPLED))


@pytest.fixture(scope="module", params=SEPARABLE)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train(request.param, folder, batch=STEP, accumulate=1)


def test_accumulated_equals_whole(whole, tmp_path):
    case, expected = whole
    assert_same_run(expected, train(case, tmp_path, batch=2, accumulate=4))


@pytest.mark.parametrize("case", SEPARABLE)
def test_uneven_micro_batches_equal_whole(case, tmp_path):
    """Micro-batches of 3, 3 and 2 examples: each counts by its examples, not as one of three."""
    expected = train(case, tmp_path, batch=STEP, accumulate=1, examples=STEP)
    assert distance(expected, train(case, tmp_path, batch=3, accumulate=3, examples=STEP), "0/") < 1e-6


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(folder, ranks=2, cuts=[(4, 1), (2, 2)])
    return folder


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2)])
def test_two_ranks_equal_one(whole, two_ranks, batch, accumulate):
    case, expected = whole
    ranks = [record_of(two_ranks, case, rank, batch=batch, accumulate=accumulate) for rank in range(2)]
    for record in ranks:
        assert_same_run(expected, record)
    for name in ranks[0]:
        if name.startswith(("final/", "scaffold/")):
            assert torch.equal(ranks[0][name], ranks[1][name]), name


@pytest.mark.parametrize("case", COUPLED)
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2)])
def test_two_ranks_equal_one_with_as_many_rows_in_a_micro_batch(case, two_ranks, tmp_path, batch, accumulate):
    expected = train(case, tmp_path, batch=2 * batch, accumulate=accumulate)
    for rank in range(2):
        assert_same_run(expected, record_of(two_ranks, case, rank, batch=batch, accumulate=accumulate))


def test_the_trap_is_there_in_plain_trainer(tmp_path):
    """Plain Trainer's gradient is 4 times too large at 4 accumulation steps (transformers issue 47688)."""
    norms = {}
    for batch, accumulate in ((8, 1), (2, 4)):
        recorder = Recorder()
        Trainer(
            tiny_bert(),
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_grad_norm=0.0,
                max_steps=1,
            ),
            data_collator=collate,
            train_dataset=text_rows(),
            callbacks=[recorder],
        ).train()
        norms[accumulate] = torch.cat([value.flatten() for value in recorder.gradients.values()]).norm().item()
    assert norms[4] / norms[1] == pytest.approx(4.0, rel=1e-3)
