"""Images and sounds to what a model reads: files are decoded when a row is read, so that a data set stays files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer.activations import fingerprint
from hf_transfer.data.labels import Labels
from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def with_inputs(rows: Dataset, *, split: str, role: str, name: str, labels: Labels | None) -> Dataset:
    """Rows of files under the ``name`` that the model calls them by, and ``labels``, which are -100 where unknown.

    Raises:
        ConfigurationError: A row has no file.
    """
    from datasets import Audio, Image, Value

    targets = [IGNORED] * len(rows)
    if labels is not None and "label" in rows.column_names:
        targets = [labels.encode(label) for label in rows["label"][:]]
    rows, feature = rows.select_columns([role]), rows.features[role]
    if (
        isinstance(feature, (Audio, Image))
        or _holds_paths(feature)
        or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ):
        # one form, so that any two sets can be joined
        rows = rows.cast_column(role, {"image": Image, "audio": Audio}[role](decode=False))
    elif isinstance(feature, Value):
        raise ConfigurationError(f"data: '{role}' of '{split}' holds {feature.dtype}: expected files.")
    missing = [row for row, each in enumerate(_paths(rows, role)) if each is None]
    if missing:
        raise ConfigurationError(
            f"data: '{role}' is missing in {len(missing):,} of {len(rows):,} rows of '{split}' "
            f"(first in row {missing[0]})."
        )
    return rows.rename_column(role, name).add_column("labels", targets)  # type: ignore[call-arg]


def under(rows: Dataset, role: str, folder: Path) -> Dataset:
    """``rows`` whose relative paths in column ``role`` start from ``folder``."""
    if role not in rows.column_names or not _holds_paths(rows.features[role]):
        return rows

    def absolute(path: str | None) -> dict[str, str | None]:
        return {role: path if path is None or "://" in path else str((folder / path).absolute())}

    return rows.map(absolute, input_columns=role)


@dataclass(frozen=True)
class Reader(ABC):
    """A transform of a data set (``Dataset.with_transform``): files to what a model reads.

    Args:
        processor: The model's image processor or feature extractor.
    """

    processor: Any

    @property
    def name(self) -> str:
        """What the model calls its input."""
        return self.processor.model_input_names[0]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {**batch, **self.read(batch[self.name])} if self.name in batch else batch

    @abstractmethod
    def read(self, stored: list[Any]) -> dict[str, list[Any]]:
        """The model's inputs by name, one of each file."""

    @abstractmethod
    def note(self, stored: Any) -> str | None:
        """What is done to a file beside what the processor says."""

    def digest(self, rows: Dataset) -> str:
        """Names what is done and which files it is done to: their paths, sizes and times; bytes are the rows' own."""
        files = [file for file in _paths(rows, self.name) if file and os.path.isfile(file)]
        states = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        settings = {**vars(self), "processor": self.processor.to_dict()}
        return fingerprint(type(self).__name__, settings, states)


@dataclass(frozen=True)
class ImageReader(Reader):
    """Images to pixel values."""

    @property
    def mode(self) -> str:
        """Of Pillow, that the model reads: one channel where the processor has the mean of one."""
        mean = getattr(self.processor, "image_mean", None)
        return "L" if isinstance(mean, (list, tuple)) and len(mean) == 1 else "RGB"

    def read(self, stored: list[Any]) -> dict[str, list[Any]]:
        encoded = self.processor([read_image(each).convert(self.mode) for each in stored], return_tensors="pt")
        return {name: list(encoded[name]) for name in self.processor.model_input_names if name in encoded}

    def note(self, stored: Any) -> str | None:
        found = read_image(stored).mode
        return f"note: images are read as {self.mode}, the first is {found}" if found != self.mode else None


@dataclass(frozen=True)
class SoundReader(Reader):
    """Sounds to one channel at the model's sampling rate, and to what the model makes of that.

    Args:
        processor: The model's feature extractor.
        max_seconds: What a sound is cut to; and padded to, where the model reads samples and no attention mask, for
            what it says of a sound would else depend on the longest of the batch.
    """

    max_seconds: float | None = None

    def read(self, stored: list[Any]) -> dict[str, list[Any]]:
        rate = self.processor.sampling_rate
        most = None if self.max_seconds is None else round(self.max_seconds * rate)
        sounds = [resampled(*read_sound(each), rate)[:most] for each in stored]
        inputs = [self.processor(sound, sampling_rate=rate, return_tensors="np")[self.name][0] for sound in sounds]
        if most is not None and self.processor.return_attention_mask is False and inputs[0].ndim == 1:
            filler = self.processor.padding_value
            inputs = [np.pad(samples, (0, most - len(samples)), constant_values=filler) for samples in inputs]
        return {self.name: inputs}

    def note(self, stored: Any) -> str | None:
        found, expected = read_sound(stored)[1], self.processor.sampling_rate
        return f"note: sounds are resampled to {expected} Hz, the first has {found}" if found != expected else None


def read_image(stored: Any) -> Image:
    """An image as it is seen, from bytes, a path, or its pixels (H, W) or (H, W, C), whole numbers from 0 to 255.

    Raises:
        ConfigurationError: It cannot be read, or has pixels of another kind (32 bits, floats).
    """
    from PIL import Image, ImageOps

    try:
        image = _from_pixels(stored) if isinstance(stored, (list, np.ndarray)) else Image.open(_file(stored))
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigurationError(f"data: {_named(stored)} is no image that can be read: {error}") from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ConfigurationError(f"data: {_named(stored)} has pixels of mode {image.mode}: expected 8 or 16 bits.")
    return image


def _from_pixels(stored: Any) -> Image:
    from PIL import Image

    pixels = np.asarray(stored)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} ({pixels.dtype})")
    return Image.fromarray((pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).astype(np.uint8))


def read_sound(stored: Any) -> tuple[np.ndarray, int]:
    """A sound as float32 samples (T,), the mean of its channels, and its sampling rate.

    Args:
        stored: Bytes or a path (WAV, FLAC, OGG, MP3), or ``{"array": ..., "sampling_rate": ...}``.

    Raises:
        ConfigurationError: It cannot be read, or is empty.
    """
    import soundfile

    try:
        if isinstance(stored, Mapping) and stored.get("array") is not None:
            samples, rate = np.asarray(stored["array"], dtype=np.float32), int(stored["sampling_rate"])
        else:
            samples, rate = soundfile.read(_file(stored), dtype="float32", always_2d=True)
            samples = samples.mean(axis=1)
    except (OSError, ValueError, TypeError, KeyError, soundfile.SoundFileError) as error:
        raise ConfigurationError(f"data: {_named(stored)} is no sound that can be read: {error}") from error
    if samples.ndim != 1 or not len(samples):
        raise ConfigurationError(f"data: {_named(stored)} has the shape {samples.shape}: expected samples (T,).")
    return samples, rate


def resampled(samples: np.ndarray, found: int, expected: int) -> np.ndarray:
    """``samples`` at the ``expected`` rate, by a polyphase filter that lets nothing above half of it through."""
    if found == expected:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(found, expected)
    return resample_poly(samples, expected // shared, found // shared).astype(np.float32)


def _holds_paths(feature: Any) -> bool:
    from datasets import Value

    return feature in (Value("string"), Value("large_string"))


def _paths(rows: Dataset, column: str) -> list[str | None]:
    """The path of each example, "" where it is stored in the row itself, None where there is nothing."""
    import pyarrow.compute
    from datasets import Audio, Image

    paths: list[str | None] = []
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=64):
        values = table[column]
        if not isinstance(rows.features[column], (Audio, Image)):
            paths += ["" if each.is_valid else None for each in values]
            continue
        parts = [pyarrow.compute.struct_field(values, name) for name in ("path", "bytes")]
        for path, inside, given in zip(*parts, values, strict=True):
            found = path.as_py() or ("" if inside.is_valid else None)
            paths.append(found if given.is_valid else None)
    return paths


def _file(stored: Any) -> Any:
    if isinstance(stored, Mapping) and stored.get("bytes") is not None:
        return BytesIO(stored["bytes"])
    path = stored["path"] if isinstance(stored, Mapping) else stored
    if "://" not in path:
        return path
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:  # in an archive, or elsewhere
        return BytesIO(file.read())


def _named(stored: Any) -> str:
    path = stored.get("path") if isinstance(stored, Mapping) else stored
    return f"'{path}'" if isinstance(path, str) else "an example"
