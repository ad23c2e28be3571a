"""How far two samples are from each other: maximum mean discrepancies and CORAL, pure functions of features (N, D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_transfer.errors import ConfigurationError

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the bandwidth: the five Gaussian kernels of DAN (Long et al. 2015), each twice as wide as the one before."""

TILE = 512  # rows and columns of the kernel matrix that are computed at once: 1 MiB of float32 per buffer
GPU_TILE = 4096
MEDIAN_ROWS = 1024  # whose distances the median heuristic sorts: half a million

Bandwidth = Literal["mean", "median"]


def gaussian_bandwidth(features: Tensor, *, heuristic: Bandwidth = "mean") -> Tensor:
    """The mean or median of the squared distances between different rows, a scale for Gaussian kernels.

    The mean is ``2 / (N - 1) * (sum |x|^2 - |sum x|^2 / N)`` and takes no distances (N D operations in place of
    N^2 D); the median (Gretton et al. 2012, section 8) is that of at most 1,024 rows, evenly taken.

    Args:
        features: (N, D), both samples together.
        heuristic: "mean" or "median".

    Returns:
        A scalar without gradient, in the unit of the features squared; 1 where all rows are the same, for a kernel of
        no width is none.
    """
    features = _promoted(features.detach())
    if heuristic == "median":
        step = math.ceil(len(features) / MEDIAN_ROWS)
        scale = (
            torch.pdist(features[::step]).square().median() if len(features[::step]) > 1 else features.new_zeros(())
        )
    else:
        centred = features - features.mean(0)
        scale = 2 * centred.square().sum() / max(len(features) - 1, 1)
    return torch.where(scale > 0, scale, 1.0)


def mmd(
    source: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    bandwidth: float | Bandwidth = "mean",
    multiples: Sequence[float] = MULTIPLES,
    unbiased: bool = False,
) -> Tensor:
    """The squared maximum mean discrepancy between two samples, ``E k(s, s') + E k(t, t') - 2 E k(s, t)``.

    The kernel is the mean of Gaussians ``exp(-|x - y|^2 / (m b))`` over the ``multiples`` m of the bandwidth b. Of
    several layers it is the product of the layers' kernels, which compares their joint distribution (joint MMD, Long
    et al. 2017); for DAN's sum of layers, add up the ``mmd`` of each.

    One pass over tiles of the kernel matrix gives value and gradient, so that memory stays at a few tiles whatever N;
    where a multiple is half of another its kernel is the square of that one's, and five cost one exponential.
    All is computed in float32 (float64 stays). There is no second derivative, and none of the bandwidth.

    Args:
        source: (N, D), or one such tensor per layer.
        target: (M, D), or as many; D is that of ``source``, layer by layer.
        bandwidth: b; or taken from the rows of both samples, see :func:`gaussian_bandwidth`.
        multiples: Of the bandwidth, one kernel each.
        unbiased: Leave out the pairs of a row with itself (U-statistic; can be negative). The biased estimate is at
            least 0, and 0 for equal samples.

    Returns:
        A scalar, at most 2.

    Raises:
        ConfigurationError: Shapes that do not fit, a sample without rows, or of one row where ``unbiased``; a
            bandwidth or multiple that is not above 0.

    References:
        Gretton et al. 2012, A Kernel Two-Sample Test, eq. 3 and 5. Long et al. 2015 (DAN) for the kernels.
    """
    layers = [_scaled(pair, bandwidth) for pair in _layers(source, target, least=2 if unbiased else 1)]
    sizes = len(layers[0][0]), len(layers[0][1])
    return _TiledMMD.apply(sizes, _checked(multiples), unbiased, *(torch.cat(pair) for pair in layers))


def linear_mmd(
    source: Tensor,
    target: Tensor,
    *,
    bandwidth: float | Bandwidth = "mean",
    multiples: Sequence[float] = MULTIPLES,
) -> Tensor:
    """An unbiased estimate of the squared MMD in time linear in N: the mean over disjoint pairs of rows of
    ``k(s, s') + k(t, t') - k(s, t') - k(s', t)`` (Gretton et al. 2012, Lemma 14).

    Its variance is that of N / 2 terms, where :func:`mmd` averages over N^2; rows should come in random order.

    Args:
        source: (N, D).
        target: (M, D); of the longer sample, and of an odd number, the last rows are left out.
        bandwidth: See :func:`mmd`.
        multiples: See :func:`mmd`.

    Returns:
        A scalar, differentiable as often as one likes.

    Raises:
        ConfigurationError: Shapes that do not fit, or fewer than two rows in a sample.
    """
    ((source, target),) = _layers(source, target, least=2)
    (source, target), multiples = _scaled((source, target), bandwidth), _checked(multiples)
    pairs = min(len(source), len(target)) // 2
    s, s2, t, t2 = (sample[first : 2 * pairs : 2] for sample in (source, target) for first in (0, 1))

    def k(x: Tensor, y: Tensor) -> Tensor:
        return _kernel((x - y).square().sum(-1), multiples)

    return (k(s, s2) + k(t, t2) - k(s, t2) - k(s2, t)).mean()


def random_feature_mmd(
    source: Tensor,
    target: Tensor,
    directions: Tensor,
    *,
    bandwidth: float | Bandwidth = "mean",
    multiples: Sequence[float] = MULTIPLES,
) -> Tensor:
    """The biased squared MMD with kernels that random Fourier features approximate, in time linear in N.

    ``k(x, y) ~ 1/R sum_r cos(w_r (x - y))`` with w_r ~ N(0, 2 / (m b)); each multiple gets its share of the
    directions. The estimate is that of :func:`mmd` up to O(1 / sqrt(R)).

    Args:
        source: (N, D).
        target: (M, D).
        directions: (R, D), drawn from a standard normal distribution (``torch.randn``); keep them for a whole run, so
            that one and the same discrepancy falls.
        bandwidth: See :func:`mmd`.
        multiples: See :func:`mmd`.

    Returns:
        A scalar of at least 0.

    Raises:
        ConfigurationError: Shapes that do not fit, or fewer directions than multiples.

    References:
        Rahimi & Recht 2007, Random Features for Large-Scale Kernel Machines. Zhao & Meng 2015, FastMMD.
    """
    ((source, target),) = _layers(source, target, least=1)
    if directions.dim() != 2 or directions.shape[1] != source.shape[1] or len(directions) < len(multiples):
        raise ConfigurationError(
            f"directions has the shape {tuple(directions.shape)}: expected (R, {source.shape[1]}), R at least "
            f"{len(multiples)}."
        )
    samples, multiples = _scaled((source, target), bandwidth), _checked(multiples)
    shares = directions.to(source.dtype).tensor_split(len(multiples))
    values = []
    for multiple, share in zip(multiples, shares, strict=True):
        angles = [sample @ share.t() * math.sqrt(2 / multiple) for sample in samples]
        gaps = [wave(angles[0]).mean(0) - wave(angles[1]).mean(0) for wave in (torch.cos, torch.sin)]
        values.append(gaps[0].square().mean() + gaps[1].square().mean())
    return torch.stack(values).mean()


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Correlation alignment: the squared Frobenius distance of the two covariance matrices, over ``4 D^2``.

    It sees second moments only: a difference of means is invisible to it.

    Args:
        source: (N, D), N at least 2.
        target: (M, D), M at least 2.

    Returns:
        A scalar, in the unit of the features to the fourth power.

    Raises:
        ConfigurationError: Shapes that do not fit, or fewer than two rows in a sample.

    References:
        Sun & Saenko 2016, Deep CORAL, eq. 1 to 3.
    """
    ((source, target),) = _layers(source, target, least=2)
    difference = torch.cov(source.t()) - torch.cov(target.t())
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def _kernel(distances: Tensor, multiples: Sequence[float]) -> Tensor:
    """The mean of Gaussians of squared distances, in units of the bandwidth."""
    return torch.stack([(-distances / multiple).exp() for multiple in multiples]).mean(0)


class _TiledMMD(torch.autograd.Function):
    """The squared MMD of samples joined layer by layer, (N + M, D) in units of the bandwidth's root.

    With weights W (1 / N^2 within the source, 1 / M^2 within the target, -1 / (N M) between them), k' the kernel's
    derivative in the squared distance and G = W k', the value is ``sum W k`` and the gradient in row i is
    ``4 sum_j G_ij (x_i - x_j)``: row sums and one matrix product. A tile above the diagonal serves the one below it.
    """

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, int], multiples: list[float], unbiased: bool, *layers: Tensor) -> Tensor:
        pairs = [n * (n - 1) if unbiased else n * n for n in sizes]
        wanted = [layer.requires_grad for layer in layers]
        centred = [layer - layer.mean(0) for layer in layers]
        tiles = [_Tiles(layer, multiples, slopes=any(wanted)) for layer in centred]
        total = centred[0].new_zeros(())
        for one, other in combinations_with_replacement(_blocks(sizes, tiles[0].size), 2):
            weight = 1 / pairs[one.sample] if one.sample == other.sample else -1 / (sizes[0] * sizes[1])
            kernels = [tile.compute(one.rows, other.rows) for tile in tiles]
            kernel = prod(kernels[1:], start=kernels[0])
            missing = len(kernel) if unbiased and one is other else 0
            total += (1 if one is other else 2) * weight * (kernel.sum() - missing)
            for place, tile in enumerate(tiles):
                if wanted[place]:
                    others = prod(kernels[:place] + kernels[place + 1 :])
                    tile.pull(one.rows, other.rows, 4 * weight * others)
        ctx.gradients = [tile.gradient if each else None for tile, each in zip(tiles, wanted, strict=True)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else grad_output * gradient for gradient in ctx.gradients]
        return None, None, None, *gradients


class _Block(NamedTuple):
    sample: int  # 0 is the source
    rows: slice


def _blocks(sizes: tuple[int, int], size: int) -> list[_Block]:
    """Stretches of joined rows, none of which has rows of both samples."""
    source, target = sizes
    ends = [(0, 0, source), (1, source, source + target)]
    return [
        _Block(sample, slice(start, min(start + size, stop)))
        for sample, first, stop in ends
        for start in range(first, stop, size)
    ]


class _Tiles:
    """One tile after the other of a layer's kernel matrix and of its derivative, in the same few buffers."""

    def __init__(self, rows: Tensor, multiples: list[float], *, slopes: bool) -> None:
        self.size = TILE if rows.device.type == "cpu" else GPU_TILE
        self.gradient = torch.zeros_like(rows)
        self._rows = rows
        self._norms = rows.square().sum(1)
        self._multiples = multiples
        self._farthest = -0.9 * math.log(torch.finfo(rows.dtype).tiny) * max(multiples)
        side = min(self.size, len(rows))
        self._room = [rows.new_empty(side * side) for _ in range(4 if slopes else 3)]

    def compute(self, one: slice, other: slice) -> Tensor:
        """The kernel (I, J) between two stretches of rows; it is overwritten by the next."""
        shape = one.stop - one.start, other.stop - other.start
        distances, power, kernel, *slope = (room[: shape[0] * shape[1]].view(shape) for room in self._room)
        torch.addmm(self._norms[other], self._rows[one], self._rows[other].t(), alpha=-2, out=distances)
        distances.add_(self._norms[one, None]).clamp_(0, self._farthest)  # beyond, no kernel is a normal number
        if one == other:
            distances.fill_diagonal_(0)
        previous = math.inf
        for place, multiple in enumerate(self._multiples):
            if previous == 2 * multiple:
                power.square_()
            else:
                torch.mul(distances, -1 / multiple, out=power).exp_()
            previous = multiple
            for total, factor in zip((kernel, *slope), (1, -1 / multiple), strict=False):
                torch.mul(power, factor, out=total) if place == 0 else total.add_(power, alpha=factor)
        for total in (kernel, *slope):
            total.div_(len(self._multiples))
        self._slope = slope
        return kernel

    def pull(self, one: slice, other: slice, weight: float | Tensor) -> None:
        """Add ``sum_j weight k'_ij (x_i - x_j)`` to the gradient in the rows of one side, and so to the other's."""
        (slope,) = self._slope
        slope.mul_(weight)
        if one == other:
            slope.fill_diagonal_(0)  # a row does not pull at itself, not by rounding either
        sides = [(slope, one, other)] if one == other else [(slope, one, other), (slope.t(), other, one)]
        for pull, here, there in sides:
            self.gradient[here] += pull.sum(1, keepdim=True) * self._rows[here]
            self.gradient[here].addmm_(pull, self._rows[there], alpha=-1)


def _layers(
    source: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor], *, least: int
) -> list[tuple[Tensor, Tensor]]:
    """Source and target layer by layer, checked."""
    sources, targets = ([each] if isinstance(each, Tensor) else list(each) for each in (source, target))
    if len(sources) != len(targets) or not sources:
        raise ConfigurationError(f"source has {len(sources)} layers and target {len(targets)}: expected as many.")
    for one, other in zip(sources, targets, strict=True):
        if one.dim() != 2 or other.dim() != 2 or one.shape[1] != other.shape[1]:
            raise ConfigurationError(
                f"source and target have the shapes {tuple(one.shape)} and {tuple(other.shape)}: expected (N, D) and "
                "(M, D)."
            )
        if min(len(one), len(other)) < least or len(one) != len(sources[0]) or len(other) != len(targets[0]):
            raise ConfigurationError(
                f"source has {len(one)} rows and target {len(other)}: expected at least {least} of each, and as many "
                "in every layer."
            )
    return [(_promoted(one), _promoted(other)) for one, other in zip(sources, targets, strict=True)]


def _promoted(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _scaled(pair: tuple[Tensor, Tensor], bandwidth: float | Bandwidth) -> tuple[Tensor, Tensor]:
    """Both samples in units of the bandwidth's root."""
    if isinstance(bandwidth, str) and bandwidth in get_args(Bandwidth):
        scale = gaussian_bandwidth(torch.cat(pair), heuristic=bandwidth).sqrt()
        return pair[0] / scale, pair[1] / scale
    if isinstance(bandwidth, str) or not 0 < bandwidth < math.inf:
        raise ConfigurationError(f"bandwidth = {bandwidth!r}: expected a number above 0, 'mean' or 'median'.")
    return pair[0] / math.sqrt(bandwidth), pair[1] / math.sqrt(bandwidth)


def _checked(multiples: Sequence[float]) -> list[float]:
    """The widest first, so that the next may be its square."""
    if not multiples or not all(0 < each < math.inf for each in multiples):
        raise ConfigurationError(f"multiples = {tuple(multiples)}: expected at least one, and all above 0.")
    return sorted(multiples, reverse=True)
