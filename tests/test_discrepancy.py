"""Discrepancies against float64 references that are written as the papers write them, and closed forms."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hf_transfer import discrepancy
from hf_transfer.discrepancy import MULTIPLES, coral, gaussian_bandwidth, linear_mmd, mmd, random_feature_mmd
from hf_transfer.errors import ConfigurationError


def samples(n: int = 13, m: int = 9, d: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, d, generator=generator, dtype=torch.float64)
    target = 1.3 * torch.randn(m, d, generator=generator, dtype=torch.float64) + 0.4
    return source.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1)


def mean_distance(pair: tuple[Tensor, Tensor]) -> Tensor:
    joined = torch.cat(pair).detach()
    return squared_distances(joined, joined).sum() / (len(joined) * (len(joined) - 1))


def reference(layers, *, bandwidths, multiples=MULTIPLES, unbiased=False):
    """Gretton et al. 2012, eq. 3 and 5, with a product of kernels over layers."""

    def k(x, y):
        product = 1.0
        for place, bandwidth in enumerate(bandwidths):
            distances = squared_distances(layers[place][x], layers[place][y])
            product = product * sum(torch.exp(-distances / (m * bandwidth)) for m in multiples) / len(multiples)
        return product

    n, m = len(layers[0][0]), len(layers[0][1])
    within = []
    for sample, size in ((0, n), (1, m)):
        kernel = k(sample, sample)
        if unbiased:
            within.append((kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1)))
        else:
            within.append(kernel.mean())
    return within[0] + within[1] - 2 * k(0, 1).mean()


def same(value: Tensor, expected: Tensor, inputs, *, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(3 * value, inputs)
    theirs = torch.autograd.grad(3 * expected, inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("tile", [2, 4, 512])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("multiples", [MULTIPLES, (1.0,), (3.0, 0.7, 1.4)])
def test_mmd_is_the_papers(monkeypatch, tile, unbiased, multiples):
    monkeypatch.setattr(discrepancy, "TILE", tile)
    pair = samples()
    for bandwidth in ("mean", 2.5):
        scale = mean_distance(pair) if bandwidth == "mean" else torch.tensor(bandwidth)
        expected = reference([pair], bandwidths=[scale], multiples=multiples, unbiased=unbiased)
        same(mmd(*pair, bandwidth=bandwidth, multiples=multiples, unbiased=unbiased), expected, pair)


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_of_several_layers_is_that_of_the_product_kernel(monkeypatch, unbiased):
    monkeypatch.setattr(discrepancy, "TILE", 4)
    first, second, third = samples(), samples(d=3, seed=1), samples(d=7, seed=2)
    layers = [first, second, third]
    expected = reference(layers, bandwidths=[mean_distance(pair) for pair in layers], unbiased=unbiased)
    value = mmd([pair[0] for pair in layers], [pair[1] for pair in layers], unbiased=unbiased)
    same(value, expected, [*first, *second, *third])


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_mmd_in_single_and_half_precision(far):
    """Far from the origin the expansion of |x - y|^2 would cancel, were the rows not centred."""
    source, target = samples(200, 150, 16)
    expected = reference([(source, target)], bandwidths=[mean_distance((source, target))])
    (theirs,) = torch.autograd.grad(expected, source)
    shifted = [(each.detach() + far).float().requires_grad_() for each in (source, target)]
    value = mmd(*shifted)
    (ours,) = torch.autograd.grad(value, shifted[0])
    assert abs(value.item() - expected.item()) < (1e-6 if far == 0 else 1e-5)
    assert (ours - theirs).norm() < (1e-5 if far == 0 else 1e-3) * theirs.norm()
    for dtype in (torch.bfloat16, torch.float16):
        for bandwidth in ("mean", "median"):
            wide = [torch.cat([100 * each.detach()] * 40, 1).to(dtype) for each in (source, target)]
            half, whole = (mmd(*each, bandwidth=bandwidth) for each in (wide, [each.float() for each in wide]))
            assert half.dtype == torch.float32
            assert torch.equal(half, whole)


def test_mmd_is_zero_of_equal_samples_and_has_gradients_only_where_they_are_wanted():
    source, target = samples()
    assert abs(mmd(source, source).item()) < 1e-12
    value = mmd(source, target.detach())
    (ours,) = torch.autograd.grad(value, source)
    (theirs,) = torch.autograd.grad(mmd(source, target), source)
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(mmd(source, target), value)


def test_mmd_between_gaussians_is_the_closed_form():
    """For x - y ~ N(g, 2 I) the mean of exp(-|x - y|^2 / b) is (b / (b + 4))^(D / 2) exp(-|g|^2 / (b + 4))."""
    generator = torch.Generator().manual_seed(0)
    d, shift, b = 3, 0.8, 6.0
    source, target = (torch.randn(6000, d, generator=generator) for _ in range(2))
    within = (b / (b + 4)) ** (d / 2)
    expected = 2 * within * (1 - math.exp(-d * shift**2 / (b + 4)))
    value = mmd(source, target + shift, bandwidth=b, multiples=(1.0,), unbiased=True)
    assert abs(value.item() - expected) < 0.03 * expected
    assert abs(mmd(source, target, bandwidth=b, multiples=(1.0,), unbiased=True).item()) < 0.002


def test_the_unbiased_estimate_is_unbiased_and_the_biased_is_not():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 6, 2, generator=generator) for _ in range(600)]
    values = {
        unbiased: torch.stack([mmd(*draw, bandwidth=4.0, unbiased=unbiased) for draw in draws])
        for unbiased in (False, True)
    }
    noise = 3 * values[True].std() / math.sqrt(len(draws))
    assert values[True].mean().abs() < noise
    assert values[False].mean() > 5 * noise
    linear = torch.stack([linear_mmd(*draw, bandwidth=4.0) for draw in draws])
    assert linear.mean().abs() < 3 * linear.std() / math.sqrt(len(draws))


def test_the_linear_time_estimate_is_the_papers():
    source, target = samples(9, 8)
    total = 0.0
    for i in range(0, 8, 2):
        rows = source[i], source[i + 1], target[i], target[i + 1]

        def k(x, y):
            distance = (x - y).square().sum()
            return sum(torch.exp(-distance / (m * 2.0)) for m in MULTIPLES) / len(MULTIPLES)

        total = total + k(rows[0], rows[1]) + k(rows[2], rows[3]) - k(rows[0], rows[3]) - k(rows[1], rows[2])
    same(linear_mmd(source, target, bandwidth=2.0), total / 4, (source, target))


def test_random_features_come_near_the_kernel_as_they_grow():
    source, target = samples(60, 50)
    exact = mmd(source, target)
    errors = []
    for count in (50, 50_000):
        directions = torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        errors.append(abs(random_feature_mmd(source, target, directions) - exact).item() / exact.item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0]
    assert random_feature_mmd(source, source, directions).item() == 0
    (gradient,) = torch.autograd.grad(random_feature_mmd(source, target, directions), source)
    (expected,) = torch.autograd.grad(exact, source)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


def test_coral_is_the_papers():
    source, target = samples()

    def covariance(x):  # eq. 2
        ones = torch.ones(1, len(x), dtype=x.dtype)
        return (x.t() @ x - (ones @ x).t() @ (ones @ x) / len(x)) / (len(x) - 1)

    expected = (covariance(source) - covariance(target)).square().sum() / (4 * 5**2)
    same(coral(source, target), expected, (source, target))
    assert coral(source, source + 3).item() < 1e-20


def test_the_bandwidth_is_the_mean_or_median_squared_distance():
    features = torch.cat(samples()).detach()
    distances = torch.pdist(features).square()
    torch.testing.assert_close(gaussian_bandwidth(features), distances.mean())
    torch.testing.assert_close(gaussian_bandwidth(features, heuristic="median"), distances.median())
    many = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    near = gaussian_bandwidth(many, heuristic="median")
    assert abs(near - torch.pdist(many[:1500]).square().median()) < 0.1 * near
    assert gaussian_bandwidth(torch.ones(4, 3)) == 1
    assert gaussian_bandwidth(torch.ones(1, 3), heuristic="median") == 1


def test_equal_rows_give_numbers():
    rows = torch.ones(4, 3, requires_grad=True)
    value = mmd(rows, torch.ones(5, 3))
    (gradient,) = torch.autograd.grad(value, rows)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert not gradient.any()


@pytest.mark.parametrize("bandwidth", [0.05, 1.0, 30.0])
def test_kernels_much_narrower_than_the_distances(bandwidth):
    """Where narrow kernels are zero, wide ones are what they are: in float32 as in float64."""
    source, target = samples(20, 15, 64)
    expected = reference([(source, target)], bandwidths=[torch.tensor(bandwidth)])
    (theirs,) = torch.autograd.grad(expected, source)
    narrow = source.detach().float().requires_grad_()
    (ours,) = torch.autograd.grad(mmd(narrow, target.float(), bandwidth=bandwidth), narrow)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-30


MEMORY = """
import resource, torch
from hf_transfer.discrepancy import mmd
torch.set_num_threads(1)
source, target = (torch.randn(4096, 64).requires_grad_() for _ in range(2))
mmd(source[:600], target[:600]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mmd(source, target).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_kernel_matrix():
    """In a process of its own, whose peak nothing else has reached before."""
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100 * 1024  # KiB; the kernel matrix has 256 MiB


WRONG = {
    "widths": (lambda: mmd(torch.ones(3, 2), torch.ones(3, 4)), r"\(3, 2\) and \(3, 4\): expected \(N, D\)"),
    "a vector": (lambda: coral(torch.ones(3), torch.ones(3)), r"expected \(N, D\)"),
    "nothing": (lambda: mmd(torch.ones(0, 2), torch.ones(3, 2)), "0 rows and target 3: expected at least 1"),
    "one row": (lambda: mmd(torch.ones(1, 2), torch.ones(3, 2), unbiased=True), "1 rows.*at least 2"),
    "one row of coral": (lambda: coral(torch.ones(3, 2), torch.ones(1, 2)), "target 1: expected at least 2"),
    "layers": (lambda: mmd([torch.ones(3, 2)], []), "1 layers and target 0"),
    "rows by layer": (
        lambda: mmd([torch.ones(3, 2), torch.ones(4, 2)], [torch.ones(3, 2)] * 2),
        "4 rows and target 3: expected at least 1 of each, and as many",
    ),
    "bandwidth": (lambda: mmd(torch.ones(3, 2), torch.ones(3, 2), bandwidth=0.0), "bandwidth = 0.0: expected"),
    "a heuristic": (lambda: mmd(torch.ones(3, 2), torch.ones(3, 2), bandwidth="medium"), "bandwidth = 'medium'"),
    "multiples": (lambda: mmd(torch.ones(3, 2), torch.ones(3, 2), multiples=()), r"multiples = \(\): expected"),
    "directions": (
        lambda: random_feature_mmd(torch.ones(3, 2), torch.ones(3, 2), torch.ones(9, 3)),
        r"\(9, 3\): expected \(R, 2\), R at least 5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ConfigurationError, match=message):
        call()
