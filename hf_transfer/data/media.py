"""Images and sounds to what a model reads: files are decoded when a row is read, so that a data set stays files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer.activations import fingerprint
from hf_transfer.data.labels import Labels
from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def with_inputs(rows: Dataset, *, role: str, name: str, labels: Labels | None) -> Dataset:
    """Rows of files under the ``name`` that the model calls them by, and ``labels``, which are -100 where unknown."""
    from datasets import Audio, Image

    feature, targets = rows.features[role], [IGNORED] * len(rows)
    if isinstance(feature, (Audio, Image)):
        rows = rows.cast_column(role, replace(feature, decode=False))
    if labels is not None and "label" in rows.column_names:
        targets = [labels.encode(label) for label in rows["label"][:]]
    return rows.select_columns([role]).rename_column(role, name).add_column("labels", targets)  # type: ignore[call-arg]


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
        return {**batch, self.name: self.read(batch[self.name])} if self.name in batch else batch

    @abstractmethod
    def read(self, stored: list[Any]) -> list[Any]:
        """The model's inputs, one of each file."""

    @abstractmethod
    def note(self, stored: Any) -> str | None:
        """What is done to a file beside what the processor says."""

    def digest(self, rows: Dataset) -> str:
        """Names what is done and which files it is done to: their paths, sizes and times; bytes are the rows' own."""
        stored = rows.with_format(None)[self.name][:]
        states = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in map(_path, stored) if file]
        settings = {**vars(self), "processor": self.processor.to_dict()}
        return fingerprint(type(self).__name__, settings, states)


@dataclass(frozen=True)
class ImageReader(Reader):
    """Images to pixel values."""

    @property
    def mode(self) -> str:
        """Of Pillow, that the model reads: one channel where the processor has the mean of one."""
        return "L" if len(getattr(self.processor, "image_mean", None) or "RGB") == 1 else "RGB"

    def read(self, stored: list[Any]) -> list[Any]:
        images = [read_image(each).convert(self.mode) for each in stored]
        return list(self.processor(images, return_tensors="pt")[self.name])

    def note(self, stored: Any) -> str | None:
        found = read_image(stored).mode
        return f"note: images are read as {self.mode}, the first is {found}" if found != self.mode else None


@dataclass(frozen=True)
class SoundReader(Reader):
    """Sounds to one channel at the model's sampling rate, and to what the model makes of that.

    Args:
        processor: The model's feature extractor.
        max_seconds: What a sound is cut to.
    """

    max_seconds: float | None = None

    def read(self, stored: list[Any]) -> list[Any]:
        rate = self.processor.sampling_rate
        most = None if self.max_seconds is None else round(self.max_seconds * rate)
        sounds = [resampled(*read_sound(each), rate)[:most] for each in stored]
        return [self.processor(sound, sampling_rate=rate, return_tensors="np")[self.name][0] for sound in sounds]

    def note(self, stored: Any) -> str | None:
        found, expected = read_sound(stored)[1], self.processor.sampling_rate
        return f"note: sounds are resampled to {expected} Hz, the first has {found}" if found != expected else None


def read_image(stored: Any) -> Image:
    """An image from bytes, a path, or its pixels (H, W) or (H, W, C) from 0 to 255.

    Raises:
        ConfigurationError: It cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(stored, (list, np.ndarray)):
            return Image.fromarray(np.asarray(stored, dtype=np.uint8))
        image = Image.open(_file(stored))
        image.load()
        return image
    except (OSError, ValueError, TypeError, SyntaxError, UnidentifiedImageError) as error:
        raise ConfigurationError(f"data: {_named(stored)} is no image that can be read: {error}") from error


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


def _path(stored: Any) -> str | None:
    """The file that an example is in, if it is in one."""
    path = stored.get("path") if isinstance(stored, Mapping) else stored
    return path if isinstance(path, str) and os.path.isfile(path) else None


def _file(stored: Any) -> Any:
    if isinstance(stored, Mapping):
        return BytesIO(stored["bytes"]) if stored.get("bytes") is not None else stored["path"]
    return stored


def _named(stored: Any) -> str:
    path = stored.get("path") if isinstance(stored, Mapping) else stored
    return f"'{path}'" if isinstance(path, str) else "an example"
