"""The run folder: what ran, with what, and what came out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.errors import ConfigurationError

_MARK = "run.json"
_RECIPE = "recipe.yaml"
_STATE = "trainer_state.json"
_MADE_BY = "hf_transfer"


def is_main_process() -> bool:
    """Whether this process writes and prints: the first of those that torchrun or ``accelerate launch`` started."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, beside the model that ``save_pretrained`` puts there.

    ========================  =============================================================================
    ``run.json``              marks the folder as ours: seed, processes, labels, versions, whether it finished
    ``recipe.yaml``           the resolved recipe; ``hf-transfer run`` takes it as it is
    ``plan.txt``              what trains when and at which rate
    ``metrics.json``          scores by split, trainable parameters, seconds
    ``log_history.json``      what the Trainer logged
    ``checkpoint-*``          to resume from
    ========================  =============================================================================

    Args:
        path: Where it is; it need not exist yet.
    """

    path: Path

    def claim(
        self,
        recipe: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        may_grow: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        """Make the folder ready for a run of ``recipe``; an earlier run is only touched where that was asked for.

        Args:
            recipe: The resolved recipe as plain data.
            overwrite: Delete an earlier run.
            resume: Continue an earlier run of the same recipe; starts a new one where there is none.
            may_grow: Sections of the recipe that may have gained entries since; what was in them must be the same.
            **facts: What else ``run.json`` is to hold.

        Raises:
            ConfigurationError: The folder holds something already and neither was asked for; it is no run folder of
                ours; or the run to resume had another recipe.
        """
        self.check(recipe, overwrite=overwrite, resume=resume, may_grow=may_grow)
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write(_MARK, {"made_by": _MADE_BY, **facts, "finished": False})
        self._replace(_RECIPE, yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))

    def check(
        self,
        recipe: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        may_grow: Sequence[str] = (),
    ) -> None:
        """Raise what :meth:`claim` would raise, and change nothing."""
        if overwrite and resume:
            raise ConfigurationError(
                "--overwrite deletes the run that --resume would continue: give only one of them."
            )
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not overwrite and not resume:
            raise ConfigurationError(
                f"Output folder '{self.path}' is not empty. Name another one (--output), replace the run in it "
                "(--overwrite) or continue it (--resume)."
            )
        if not self.is_ours:
            raise ConfigurationError(
                f"Output folder '{self.path}' is not empty and holds no run of hf_transfer (no {_MARK}): it is "
                "neither overwritten nor resumed. Name another one (--output)."
            )
        if resume and (changed := _differences(old := self.recipe(), _without_gains(recipe, old, may_grow))):
            raise ConfigurationError(
                f"Cannot resume '{self.path}' with another recipe; these differ from its {_RECIPE}: "
                f"{', '.join(changed)}."
            )

    @property
    def is_ours(self) -> bool:
        """Whether an earlier run made this folder."""
        try:
            return self.read(_MARK)["made_by"] == _MADE_BY
        except (OSError, ValueError, TypeError, KeyError):
            return False

    @property
    def is_finished(self) -> bool:
        """Whether the run in this folder came to its end."""
        return self.is_ours and bool(self.read(_MARK)["finished"])

    def recipe(self) -> dict[str, Any]:
        """The recipe that the folder was made from."""
        return yaml.safe_load((self.path / _RECIPE).read_text(encoding="utf-8"))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end: the Trainer writes its state last."""
        steps = {
            state.parent: state.parent.name.rpartition("-")[2] for state in self.path.glob("checkpoint-*/" + _STATE)
        }
        complete = [folder for folder, step in steps.items() if step.isdigit()]
        return max(complete, key=lambda folder: int(steps[folder]), default=None)

    def finish(self) -> None:
        """Note that the run came to its end."""
        self.write(_MARK, {**self.read(_MARK), "finished": True})

    def read(self, name: str) -> Any:
        """The content of the JSON file ``name``."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write(self, name: str, content: Any) -> None:
        """Write the file ``name``, whole or not at all: text as it is, anything else as JSON."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        self._replace(name, text)

    def _replace(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def _without_gains(new: Mapping[str, Any], old: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """``new`` with only the entries of ``sections`` (mappings or lists) that ``old`` has too."""

    def kept(after: Any, before: Any) -> Any:
        if isinstance(after, Mapping) and isinstance(before, Mapping):
            return {key: value for key, value in after.items() if key in before}
        return after[: len(before)] if isinstance(after, list) and isinstance(before, list) else after

    return {key: kept(value, old.get(key)) if key in sections else value for key, value in new.items()}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    changed = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += _differences(before, after, f"{where}{key}.")
        elif before != after:
            changed.append(f"{where}{key}")
    return changed
