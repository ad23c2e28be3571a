import math

import pytest

from hf_transfer.errors import ConfigurationError
from hf_transfer.schedules import GradualUnfreeze, Ramp, SlantedTriangular, TopLevels, open_levels


def test_by_epoch_opens_one_level_per_epoch_as_ulmfit():
    """Epoch 1: the head; each epoch after it one level more; exactly at the epoch's first step."""
    epochs, steps_per_epoch, levels = 5, 7, 8
    for step in range(epochs * steps_per_epoch):
        opened = open_levels(GradualUnfreeze(), step / (epochs * steps_per_epoch), levels, epochs)
        assert opened == 1 + step // steps_per_epoch


@pytest.mark.parametrize("levels", [1, 2, 8])
def test_by_share_opens_everything_in_equal_stages(levels):
    schedule = GradualUnfreeze(until=0.6)
    assert open_levels(schedule, 0.0, levels, 3) == 1
    assert open_levels(schedule, 0.6, levels, 3) == levels
    if levels == 8:
        stages = [open_levels(schedule, 0.6 * (stage + 0.5) / 7, levels, 3) for stage in range(7)]
        assert stages == list(range(1, 8))


def test_levels_out_of_reach_never_open():
    assert GradualUnfreeze().opens_at(3, 8, epochs=3) == math.inf
    assert GradualUnfreeze().opens_at(2, 8, epochs=3) == pytest.approx(2 / 3)


def test_top_levels_is_constant():
    assert [open_levels(TopLevels(2), progress, 8, 3) for progress in (0.0, 0.5, 1.0)] == [3, 3, 3]


def test_slanted_triangular_equals_the_papers_formula():
    """Howard & Ruder 2018, equation 3, with T = 1,000 iterations."""
    total, cut_fraction, ratio = 1000, 0.1, 32
    cut = math.floor(total * cut_fraction)
    schedule = SlantedTriangular(cut_fraction, ratio)
    for t in (0, 1, 50, 99, 100, 101, 500, 999, 1000):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        assert schedule(t / total) == pytest.approx((1 + p * (ratio - 1)) / ratio, abs=1e-12)


def test_ramp_equals_the_papers_formula():
    assert Ramp()(0.0) == 0.0
    assert Ramp()(0.5) == pytest.approx(math.tanh(2.5))  # 2 / (1 + exp(-x)) - 1 = tanh(x / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradualUnfreeze(until=0.5, epochs_per_level=1), "not both"),
        (lambda: GradualUnfreeze(until=1.5), "found 1.5"),
        (lambda: GradualUnfreeze(epochs_per_level=0), "positive"),
        (lambda: TopLevels(-1), "found -1"),
        (lambda: SlantedTriangular(cut_fraction=1.0), "cut_fraction"),
        (lambda: SlantedTriangular(ratio=0.5), "ratio"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
