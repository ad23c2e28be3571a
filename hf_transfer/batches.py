"""The rows of a data set as the batches that a model reads, and digests of what goes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_transfer.activations import columns_digest, fingerprint, tensors_digest
from hf_transfer.errors import ConfigurationError

if TYPE_CHECKING:
    from datasets import Dataset

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

EXAMPLE_INDEX = "example_index"
"""The column that says which row of the data set an example is, for what was computed of it before training."""

PROBE_SIZE = 4


class Batches:
    """Any rows of a data set, collated: ``batches[rows]``, with rows (B,), is what the model reads of them.

    Args:
        dataset: Tokenised (or otherwise prepared) examples. A transform set on the fly must tell what it does by a
            method ``digest(dataset)``, as that of images and sounds (``hf_transfer.data.media``).
        data_collator: Makes a padded batch of examples, the same each time.
        main_input: The column that there must be, and whose length an example's is.
        inputs: What is kept of a batch.
        targets: Columns that the collator may read besides.
        device: Where batches are put.

    Raises:
        ConfigurationError: The content of ``dataset`` cannot be named (a stream, another transform), or it has
            no column ``main_input``.
    """

    def __init__(
        self,
        dataset: Dataset,
        data_collator: Collator,
        *,
        main_input: str,
        inputs: Iterable[str],
        targets: Iterable[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        from datasets import Dataset

        transform = dataset.format["format_kwargs"].get("transform") if isinstance(dataset, Dataset) else None
        if not isinstance(dataset, Dataset) or (transform is not None and not hasattr(transform, "digest")):
            raise ConfigurationError(
                f"dataset: found {type(dataset).__name__}, expected a datasets.Dataset without a transform of your "
                "own set on the fly (apply that with map): the content names the cache."
            )
        self._transform = transform
        self._inputs = set(inputs)
        self._columns = [name for name in dataset.column_names if name in self._inputs]
        if main_input not in self._columns:
            raise ConfigurationError(
                f"dataset: expected a column '{main_input}'. Found: {', '.join(dataset.column_names)}."
            )
        read = self._inputs.union(targets)
        self._dataset = dataset.select_columns([name for name in dataset.column_names if name in read])
        self._data_collator = data_collator
        self._main_input = main_input
        self._device = device

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        columns = self._dataset[rows.tolist()]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = self._data_collator(examples)
        return {name: batch[name].to(self._device) for name in batch if name in self._inputs}

    def probe(self, order: Tensor) -> tuple[dict[str, Tensor], str]:
        """A few examples spread over ``order`` (N,) as a batch, and its digest.

        Raises:
            ConfigurationError: The collator makes something else of them the second time.
        """
        rows = order[torch.linspace(0, len(order) - 1, min(PROBE_SIZE, len(order))).long()]
        batch = self[rows]
        digest = tensors_digest(batch)
        if digest != tensors_digest(self[rows]):
            raise ConfigurationError(
                "data_collator: it makes different batches of the same examples (random masking or augmentation): "
                "nothing can be kept from one epoch to the next."
            )
        return batch, digest

    def digest(self) -> str:
        """A digest of the columns that become the model's inputs, and of what is done to them when they are read."""
        content = columns_digest(self._dataset, self._columns)
        if self._transform is None:
            return content
        return fingerprint(content, self._transform.digest(self._dataset))

    def by_length(self) -> Tensor:
        """The rows from the shortest to the longest; as they are where a row of the main input has no length."""
        import pyarrow.compute
        from datasets import LargeList, List

        if not isinstance(self._dataset.features[self._main_input], (List, LargeList)):
            return torch.arange(len(self))
        rows = self._dataset.select_columns([self._main_input]).with_format("arrow")[:]
        return torch.tensor(pyarrow.compute.list_value_length(rows[self._main_input]).to_numpy()).argsort(stable=True)
