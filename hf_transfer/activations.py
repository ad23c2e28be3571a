"""A memory-mapped store of per-example hidden states on disk, and the fingerprint that names what they came from."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_transfer.errors import ConfigurationError

if TYPE_CHECKING:
    from datasets import Dataset

_HEADER_BYTES = 1024
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class Activations:
    """Rows of hidden states of N examples, a different number of rows (tokens) for each.

    Args:
        values: (R, D) the rows of all examples; those of one example follow each other.
        starts: (N,) the first row of each example.
        lengths: (N,) how many rows each example has.
    """

    values: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def open(cls, path: Path) -> Activations:
        """Map the file at ``path`` into memory; rows are read from disk when they are used.

        Raises:
            ConfigurationError: The file is damaged or cut short.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return cls(*(file.get_tensor(name) for name in ("values", "starts", "lengths")))
        except SafetensorError as error:
            raise ConfigurationError(
                f"'{path}' is damaged or cut short ({error}): delete it and it is computed anew."
            ) from error

    @classmethod
    def pack(cls, hidden: Tensor, positions: Tensor) -> Activations:
        """Keep of ``hidden`` (B, T, D) the rows where ``positions`` (B, T) is True."""
        lengths = positions.sum(1).cpu()
        return cls(hidden[positions].cpu(), lengths.cumsum(0) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, examples: Tensor, positions: Tensor) -> Tensor:
        """The rows of ``examples`` (B,) in order, put where ``positions`` (B, T) is True; zero elsewhere: (B, T, D).

        Raises:
            ConfigurationError: ``positions`` has room for more or fewer rows than an example has.
        """
        found, expected = positions.sum(1), self.lengths[examples]
        if not torch.equal(found, expected):
            raise ConfigurationError(
                f"The batch has {found.tolist()} real tokens where the cached examples {examples.tolist()} have "
                f"{expected.tolist()}: expected the examples and the truncation that the cache was built from. A "
                "model of sounds that reads no attention mask needs data.max_seconds, to which all are then padded."
            )
        rows = self.starts[examples, None] + positions.cumsum(1) - 1
        hidden = self.values.index_select(0, rows.where(positions, 0).flatten()).view(*positions.shape, -1)
        return hidden.masked_fill_(~positions.unsqueeze(-1), 0)


class ActivationWriter:
    """Writes ``Activations`` to a safetensors file, batch by batch, in any order of the examples.

    The file gets its name when the ``with`` block ends without an error and every example has been written: what a
    killed run leaves behind cannot be taken for complete.

    Args:
        path: The file to write.
        examples: N, the number of examples there will be.
        dtype: What the rows are stored as: bfloat16, float16 or float32.
    """

    def __init__(self, path: Path, *, examples: int, dtype: torch.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._starts = torch.full((examples,), -1)
        self._lengths = torch.zeros(examples, dtype=torch.int64)
        self._rows = 0
        self._width = 0

    def __enter__(self) -> ActivationWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path.with_suffix(f".{uuid4().hex}.part"), "wb")
        self._file.write(bytes(_HEADER_BYTES))
        return self

    def append(self, examples: Tensor, batch: Activations) -> None:
        """Write the rows of ``batch``, whose example b is number ``examples[b]`` of the whole."""
        self._starts[examples] = batch.starts + self._rows
        self._lengths[examples] = batch.lengths
        self._rows += len(batch.values)
        self._width = batch.values.shape[1]
        self._write(batch.values.to(self._dtype))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._finish()
        if error is None:
            os.replace(self._file.name, self._path)
        else:
            os.unlink(self._file.name)

    def _finish(self) -> None:
        header = {}
        end = 0
        for name, dtype, shape in (
            ("values", self._dtype, [self._rows, self._width]),
            ("starts", torch.int64, [len(self._starts)]),
            ("lengths", torch.int64, [len(self._lengths)]),
        ):
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        self._write(self._starts)
        self._write(self._lengths)
        self._file.seek(0)
        text = json.dumps(header).encode().ljust(_HEADER_BYTES - 8)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _write(self, tensor: Tensor) -> None:
        self._file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(*parts: object) -> str:
    """A short name for ``parts``, digests and plain data: the same parts, the same name, in every process."""
    text = json.dumps(parts, sort_keys=True, default=lambda part: sorted(part) if isinstance(part, set) else str(part))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and contents (the 90 MB of MiniLM: 10 ms)."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor.detach().cpu()))
    return digest.hexdigest()


def columns_digest(dataset: Dataset, columns: Iterable[str]) -> str:
    """A digest of the content of ``columns``, row by row in the data set's present order.

    The data set's own ``_fingerprint`` would not do: it follows how the rows were made, so that saving and loading
    changes it. Rows are hashed at memory speed (2,000 tokenised texts: 2 ms).
    """
    from datasets import Audio, Image

    digest, chosen = xxhash.xxh3_128(), dataset.select_columns(sorted(columns))
    files = any(isinstance(feature, (Audio, Image)) for feature in chosen.features.values())
    for table in chosen.with_format("arrow").iter(batch_size=64 if files else 10_000):  # files may be megabytes each
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.schema.to_string(show_schema_metadata=False).encode())
            digest.update(batch.serialize())
    return digest.hexdigest()


def adapter_settings(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What PEFT's weights do not tell: how each adapter is set up, and where which of them are switched on."""
    settings = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    switched_on = {
        name: module.active_adapters
        for name, module in model.named_modules()
        if getattr(module, "disable_adapters", None) is False
    }
    return settings, switched_on
