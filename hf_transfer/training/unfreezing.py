"""Opens and freezes the levels of a model as a schedule says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_transfer.depth import block_names, embedding_names, named_parameters, parameter_depths
from hf_transfer.errors import ConfigurationError
from hf_transfer.schedules import UnfreezeSchedule, open_levels


@dataclass(frozen=True)
class PlanRow:
    """What trains at one depth: a row of the table shown before training."""

    depth: int
    modules: str
    parameters: int
    learning_rate: float
    opens_at_epoch: float


class TrainableLevels:
    """The levels of a model that hold trainable parameters, and which of them are open.

    Holds parameter *names*: under FSDP2 the parameters themselves are replaced. Closed means no gradient and eval
    mode, so that everything below the lowest open block is a fixed function of the input.

    Args:
        model: The unwrapped model; what requires a gradient now is what may ever train.
        schedule: When each level opens; without one all are open throughout.
    """

    def __init__(self, model: nn.Module, schedule: UnfreezeSchedule | None = None) -> None:
        self._model = model
        self._schedule = schedule
        every_depth = parameter_depths(model)
        self.depths = {name: every_depth[name] for name, value in model.named_parameters() if value.requires_grad}
        if not self.depths:
            raise ConfigurationError(f"No parameter of {type(model).__name__} requires a gradient: nothing trains.")
        self._blocks = block_names(model)
        self.head = len(self._blocks) + 1
        self.levels = sorted(set(self.depths.values()), reverse=True)
        self.open_all()

    def open_all(self) -> None:
        """Let everything require a gradient: how optimizer and DDP must see the model when they are made."""
        self._open_from(self.levels[-1])
        self._frozen: list[str] = []
        self._following = False

    def follow(self, progress: float, epochs: float) -> bool:
        """Open what the schedule says at ``progress`` of a run of ``epochs``; returns whether anything changed."""
        if self._schedule is None:
            return False
        lowest = self.levels[open_levels(self._schedule, progress, len(self.levels), epochs) - 1]
        if self._following and lowest == self.lowest_open:
            return False
        self._following = True
        self._open_from(lowest)
        self._frozen = [*embedding_names(self._model), *self._blocks[: lowest - 1]] if lowest > 0 else []
        return True

    def stages(self, epochs: float) -> list[int]:
        """The lowest open depth of every stage from now on, top first."""
        opens = (self._opens_at(level, epochs) for level in range(len(self.levels)))
        return [depth for depth, at in zip(self.levels, opens, strict=True) if at < 1 and depth <= self.lowest_open]

    def eval_frozen(self) -> None:
        """Put what lies below the lowest open block into eval mode; the Trainer calls ``model.train()`` every step."""
        for name in self._frozen:
            self._model.get_submodule(name).eval()

    def plan(self, rates: dict[int, float], epochs: float) -> list[PlanRow]:
        """One row per level, top first, for a run of ``epochs`` with ``rates`` by depth."""
        parameters = named_parameters(self._model)
        rows = []
        for level, depth in enumerate(self.levels):
            names = [name for name, at in self.depths.items() if at == depth]
            size = sum(parameters[name].numel() for name in names)
            opens = self._opens_at(level, epochs) * epochs
            rows.append(PlanRow(depth, _common_modules(names), size, rates[depth], opens))
        return rows

    def _opens_at(self, level: int, epochs: float) -> float:
        return self._schedule.opens_at(level, len(self.levels), epochs) if self._schedule is not None else 0.0

    def _open_from(self, lowest: int) -> None:
        parameters = named_parameters(self._model)
        for name, depth in self.depths.items():
            parameters[name].requires_grad_(depth >= lowest)
        self.lowest_open = lowest


def format_plan(rows: list[PlanRow]) -> str:
    """The plan as a table of fixed width."""
    lines = [f"{'depth':>5}  {'parameters':>12}  {'learning rate':>13}  {'opens at epoch':>14}  modules"]
    lines += [
        f"{row.depth:>5}  {row.parameters:>12,}  {row.learning_rate:>13.2e}  "
        f"{'never' if row.opens_at_epoch == float('inf') else f'{row.opens_at_epoch:.2f}':>14}  {row.modules}"
        for row in rows
    ]
    return "\n".join(lines)


def _common_modules(names: list[str]) -> str:
    """What a level is called: its block, or the first two parts of its modules' paths."""
    return ", ".join(dict.fromkeys(_trunk(name.removeprefix("base_model.model.").split(".")[:-1]) for name in names))


def _trunk(path: list[str]) -> str:
    block = next((index for index, part in enumerate(path) if part.isdigit()), 1)
    return ".".join(path[: block + 1])
