"""What varies during a run, as pure functions of ``progress`` in [0, 1]: no counters, so nothing to resume wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hf_transfer.errors import ConfigurationError

Schedule = Callable[[float], float]
"""A quantity that follows the run: takes ``progress`` (0 at the first step, 1 after the last), returns its value."""


class UnfreezeSchedule(Protocol):
    """When each level of the model opens; level 0 is the highest one that holds trainable parameters (the head)."""

    def opens_at(self, level: int, levels: int, epochs: float) -> float:
        """The progress at which ``level`` (0 = top, of ``levels``) opens in a run of ``epochs``; ``inf``: never."""


def open_levels(schedule: UnfreezeSchedule, progress: float, levels: int, epochs: float) -> int:
    """How many levels, counted from the top, train at ``progress``; at least one."""
    slack = 1e-9  # step / max_steps * epochs misses the whole number by an ulp
    return max(1, sum(schedule.opens_at(level, levels, epochs) <= progress + slack for level in range(levels)))


@dataclass(frozen=True)
class GradualUnfreeze:
    """Open the model from the top, one level at a time (Howard & Ruder 2018, ULMFiT, section 3.3).

    Levels are the head, each block from the last to the first, and the embeddings. By default the first epoch trains
    the head alone and every following epoch opens one level more, as in the paper; a run that is too short for that
    leaves the lowest levels as they were pretrained.

    Args:
        until: Share of the run by which everything is open, in equal stages; instead of ``epochs_per_level``.
        epochs_per_level: Epochs between two openings; 1 is the paper's.

    Raises:
        ConfigurationError: ``until`` outside (0, 1], ``epochs_per_level`` not positive, or both given.

    Example:
        >>> [round(GradualUnfreeze(until=0.5).opens_at(level, 3, epochs=4), 2) for level in range(3)]
        [0.0, 0.25, 0.5]
    """

    until: float | None = None
    epochs_per_level: float | None = None

    def __post_init__(self) -> None:
        if self.until is not None and self.epochs_per_level is not None:
            raise ConfigurationError("GradualUnfreeze takes 'until' or 'epochs_per_level', not both.")
        if self.until is not None and not 0 < self.until <= 1:
            raise ConfigurationError(f"GradualUnfreeze: 'until' is a share of the run in (0, 1], found {self.until}.")
        if self.epochs_per_level is not None and self.epochs_per_level <= 0:
            raise ConfigurationError(
                f"GradualUnfreeze: 'epochs_per_level' must be positive, found {self.epochs_per_level}."
            )

    def opens_at(self, level: int, levels: int, epochs: float) -> float:
        if self.until is not None:
            return self.until * level / max(1, levels - 1)
        progress = level * (self.epochs_per_level or 1.0) / epochs
        return progress if progress < 1 else math.inf


@dataclass(frozen=True)
class TopLevels:
    """Train the head and the ``blocks`` highest blocks throughout; what lies below stays as it was pretrained.

    Args:
        blocks: Number of blocks below the head that train; 0 trains the head alone. Where no head of its own trains (a
            tied language model, or one under LoRA), the highest block takes the head's place.

    Raises:
        ConfigurationError: ``blocks`` is negative.
    """

    blocks: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ConfigurationError(f"TopLevels: 'blocks' must be 0 or more, found {self.blocks}.")

    def opens_at(self, level: int, levels: int, epochs: float) -> float:
        return 0.0 if level <= self.blocks else math.inf


@dataclass(frozen=True)
class SlantedTriangular:
    """Learning-rate factor of ULMFiT: a short linear rise, a long linear fall (Howard & Ruder 2018, equation 3).

    Args:
        cut_fraction: Share of the run spent rising; 0.1 is the paper's.
        ratio: How much smaller the lowest rate is than the highest; 32 is the paper's.

    Raises:
        ConfigurationError: ``cut_fraction`` outside (0, 1), or ``ratio`` below 1.
    """

    cut_fraction: float = 0.1
    ratio: float = 32.0

    def __post_init__(self) -> None:
        if not 0 < self.cut_fraction < 1:
            raise ConfigurationError(f"SlantedTriangular: 'cut_fraction' in (0, 1), found {self.cut_fraction}.")
        if self.ratio < 1:
            raise ConfigurationError(f"SlantedTriangular: 'ratio' must be 1 or more, found {self.ratio}.")

    def __call__(self, progress: float) -> float:
        if progress < self.cut_fraction:
            height = progress / self.cut_fraction
        else:
            height = (1 - progress) / (1 - self.cut_fraction)
        return (1 + max(0.0, height) * (self.ratio - 1)) / self.ratio


@dataclass(frozen=True)
class Ramp:
    """From 0 to almost 1 along ``2 / (1 + exp(-gamma p)) - 1`` (Ganin et al. 2016, section 5.2.2).

    Args:
        gamma: Steepness; 10 is the paper's.
    """

    gamma: float = 10.0

    def __call__(self, progress: float) -> float:
        return 2 / (1 + math.exp(-self.gamma * progress)) - 1
