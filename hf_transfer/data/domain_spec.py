"""The ``data:`` section of a recipe of domain adaptation: labelled examples, and others without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer.data.domains import DomainPairs
from hf_transfer.data.prepared import PreparedData
from hf_transfer.data.spec import DataSpec
from hf_transfer.errors import ConfigurationError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

READ_OF_TARGET = ("path", "name", "data_dir", "data_files", "revision", "columns", "train", "test", "sample_by")


@dataclass(frozen=True)
class DomainDataSpec:
    """Texts, images or sounds of two domains.

    Args:
        source: Labelled examples to train on, part of which validates; its lengths are those of both domains. Its own
            test split is not read.
        target: Examples of the domain to adapt to. Their labels are not read, except those of a split called test, or
            named by ``test``, which are for the final score alone.
    """

    source: DataSpec
    target: DataSpec

    def __post_init__(self) -> None:
        for name, data in (("source", self.source), ("target", self.target)):
            if data.unlabelled is not None:
                raise ConfigurationError(f"data.{name}.unlabelled: what has no labels is data.target.")
        for option in fields(DataSpec):
            if option.name not in READ_OF_TARGET and getattr(self.target, option.name) != option.default:
                raise ConfigurationError(
                    f"data.target.{option.name}: it is not read. What is done to examples of both domains is set in "
                    "data.source; classes are not known in the target."
                )

    @property
    def unlabelled(self) -> str | None:
        """A recipe's question whether it can learn from ``data.unlabelled``: there is none here."""
        return None

    def load(self, *, task: str, base_dir: str | Path = ".") -> DatasetDict:
        """``train`` and ``validation`` of the source, ``unlabelled`` and perhaps ``test`` of the target.

        Args:
            task: See ``DataSpec.load``.
            base_dir: See ``DataSpec.load``.

        Raises:
            ConfigurationError: See ``DataSpec.load``.
        """
        from datasets import DatasetDict

        if task == "token-classification":
            raise ConfigurationError(f"data.target: {task} does not read unlabelled texts.")
        source = self.source.load(task=task, base_dir=base_dir)
        source.pop("test", None)
        return DatasetDict({**source, **self.target.load_unlabelled(task=task, base_dir=base_dir)})

    def prepare(self, raw: Mapping[str, Dataset], processor: Any, *, task: str) -> PreparedData:
        """What ``DataSpec.prepare`` makes of it, with ``DomainPairs`` to train on.

        Args:
            raw: What :meth:`load` gave.
            processor: See ``DataSpec.prepare``.
            task: See ``DataSpec.prepare``.

        Raises:
            ConfigurationError: See ``DataSpec.prepare``; or the target's test has labels that the source has not.
        """
        data = self.source.prepare(raw, processor, task=task)
        labelled = data.summaries["train"].rows
        source, target = (data.train.select(rows) for rows in (range(labelled), range(labelled, len(data.train))))
        return replace(data, train=DomainPairs(source, target, seed=self.source.seed))
