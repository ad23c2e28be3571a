"""Learning rates that follow depth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_transfer.errors import ConfigurationError


@dataclass(frozen=True)
class LearningRateBands:
    """One rate for the head, one for the upper half of the blocks, one for the lower half and the embeddings.

    Args:
        head: Rate of the head, which starts from nothing.
        upper: Rate of the upper half of the blocks, whose features are the most specific to the old task.
        lower: Rate of the lower half and the embeddings, whose features are the most general.

    Raises:
        ConfigurationError: A rate is not positive.
    """

    head: float = 1e-3
    upper: float = 1e-4
    lower: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("head", "upper", "lower"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"bands.{name} must be a positive rate, found {getattr(self, name)}.")


@dataclass(frozen=True)
class DepthRates:
    """The learning rate at each depth: uniform unless exactly one of the options says otherwise.

    Args:
        layer_decay: Rate at depth d is ``lr * layer_decay ** (top - d)`` (Howard & Ruder 2018 use 1 / 2.6; Clark et
            al. 2020 use 0.8 to 0.9 for encoders).
        bands: Absolute rates for head, upper and lower blocks; ``TrainingArguments.learning_rate`` is then not read.
        base_ratio: The head learns at ``lr``, everything below at ``base_ratio * lr``; 0.01 to 0.1 is usual.

    Raises:
        ConfigurationError: More than one is given, or a value is outside (0, 1].
    """

    layer_decay: float | None = None
    bands: LearningRateBands | None = None
    base_ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("layer_decay", "bands", "base_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} each set the rate of every layer: give only one of them.")
        for name in ("layer_decay", "base_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigurationError(f"{name} must be in (0, 1], found {value}.")

    @property
    def uniform(self) -> bool:
        """Whether every depth learns at the same rate, so that plain Trainer's groups serve."""
        return self.layer_decay in (None, 1.0) and self.bands is None and self.base_ratio in (None, 1.0)

    def at(self, depths: Iterable[int], *, head: int, learning_rate: float) -> dict[int, float]:
        """The rate of every depth in ``depths``, where ``head`` is the head's depth (number of blocks + 1)."""
        return {depth: self._at(depth, head, learning_rate) for depth in depths}

    def _at(self, depth: int, head: int, learning_rate: float) -> float:
        if self.bands is not None:
            if depth == head:
                return self.bands.head
            return self.bands.upper if depth > (head - 1) / 2 else self.bands.lower
        if self.layer_decay is not None:
            return learning_rate * self.layer_decay ** (head - depth)
        if self.base_ratio is not None and depth < head:
            return learning_rate * self.base_ratio
        return learning_rate
