"""Images and sounds as files, what is made of them when a row is read, and what cannot be read."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    ASTFeatureExtractor,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hf_transfer.batches import Batches
from hf_transfer.data.media import ImageReader, SoundReader, read_image, read_sound, resampled
from hf_transfer.data.spec import DataSpec
from hf_transfer.errors import ConfigurationError
from tests import media

IMAGES, SOUNDS = "image-classification", "audio-classification"
EIGHT = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False, return_attention_mask=True)
SIXTEEN = ViTImageProcessor(size={"height": 16, "width": 16})


def grey() -> np.ndarray:
    return np.arange(48, dtype=np.uint8).reshape(6, 8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("form", ["path", "bytes", "mapping", "array", "list"])
def test_an_image_is_the_same_however_it_is_stored(form, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(grey()))
    stored = {
        "path": str(path),
        "bytes": {"bytes": png(grey()), "path": None},
        "mapping": {"bytes": None, "path": str(path)},
        "array": grey(),
        "list": grey().tolist(),
    }[form]
    assert np.array_equal(np.asarray(read_image(stored)), grey())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("form", ["path", "bytes", "array"])
def test_a_sound_is_one_channel_however_it_is_stored(form, channels, tmp_path):
    time = np.linspace(-0.5, 0.5, 400, dtype=np.float32)
    both = np.stack([time, -0.5 * time], axis=1)[:, :channels]
    path = tmp_path / "sound.wav"
    soundfile.write(path, both, 8000, subtype="FLOAT")
    mean = both.mean(axis=1)
    stored = {
        "path": str(path),
        "bytes": {"bytes": path.read_bytes(), "path": None},
        "array": {"array": mean, "sampling_rate": 8000},
    }[form]
    samples, rate = read_sound(stored)
    assert rate == 8000
    np.testing.assert_allclose(samples, mean, atol=1e-7)


def test_resampling_keeps_a_tone_and_leaves_out_what_cannot_be_told():
    time = np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (440, 6000))
    found = resampled(low + high, 16000, 8000)
    expected = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=0.01)
    assert resampled(low, 16000, 16000) is low


def test_rows_are_decoded_when_they_are_read_and_stay_files_until_then(tmp_path):
    folder = media.write_images(tmp_path / "images", count=6)
    data = DataSpec(path="imagefolder", data_dir=str(folder))
    prepared = data.prepare(data.load(task=IMAGES), SIXTEEN, task=IMAGES)
    assert prepared.label_names == ["lower", "upper"]
    assert prepared.problem_type == "single_label_classification"
    assert [prepared.summaries[split].examples for split in ("train", "validation", "test")] == [6, 6, 6]
    assert prepared.train.with_format(None)[0]["pixel_values"]["path"].endswith(".png")
    batch = prepared.collator([prepared.train[row] for row in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    for row, (label, pixels) in enumerate(zip(batch["labels"], batch["pixel_values"], strict=True)):
        upper, lower = pixels[:, :8].mean(), pixels[:, 8:].mean()
        assert prepared.label_names[label] == ("upper" if upper > lower else "lower"), row
    assert prepared.notes == ["note: images are read as RGB, the first is L"]
    assert prepared.report()[0] == "train: 6 examples"


def test_a_processor_of_one_channel_reads_one():
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.25])
    reader = ImageReader(processor)
    (pixels,) = reader({"pixel_values": [np.stack([grey()] * 3, axis=-1)]})["pixel_values"]
    assert pixels.shape == (1, 8, 8)
    assert reader.note(grey()) is None


def test_a_batch_of_sounds_is_padded_and_cut(tmp_path):
    folder = media.write_sounds(tmp_path / "sounds", count=4, rate=16000)
    data = DataSpec(path="audiofolder", data_dir=str(folder), max_seconds=0.15)
    prepared = data.prepare(data.load(task=SOUNDS), EIGHT, task=SOUNDS)
    rows = [prepared.train[row] for row in range(4)]
    lengths = [len(row["input_values"]) for row in rows]
    assert max(lengths) == 1200
    assert min(lengths) < 1200
    batch = prepared.collator(rows)
    assert batch["input_values"].shape == (4, 1200)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert prepared.label_names == ["high", "low"]
    for row, label in zip(rows, batch["labels"], strict=True):
        spectrum = np.abs(np.fft.rfft(row["input_values"][:800]))
        pitch = spectrum.argmax() * 8000 / 800
        assert pitch == pytest.approx({"low": 300, "high": 1200}[prepared.label_names[label]], abs=20)
    assert prepared.notes == ["note: sounds are resampled to 8000 Hz, the first has 16000"]


def test_columns_of_a_table_and_rows_without_labels():
    images = [png(np.full((4, 4), 20 * row, dtype=np.uint8)) for row in range(6)]
    files = [{"bytes": image, "path": None} for image in images]
    train = Dataset.from_dict({"image": files[:4], "label": ["a", "b", "a", "b"]})
    unlabelled = Dataset.from_dict({"image": files[4:]})
    prepared = DataSpec(path="json").prepare({"train": train, "unlabelled": unlabelled}, SIXTEEN, task=IMAGES)
    assert prepared.train.with_format(None)["labels"][:] == [0, 1, 0, 1, -100, -100]
    assert prepared.train[5]["pixel_values"].mean() == pytest.approx((100 / 255 - 0.5) / 0.5, abs=1e-6)
    assert prepared.train[5]["labels"] == -100


def test_an_image_is_turned_as_it_is_seen_and_16_bits_are_scaled(tmp_path):
    turned = Image.fromarray(grey())
    exif = turned.getexif()
    exif[0x0112] = 6  # seen after a quarter turn to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "turned.png"))), np.rot90(grey(), k=-1))
    Image.fromarray(grey().astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "deep.png"))), grey())
    assert read_image(grey()[..., None]).mode == "L"


def test_sets_that_store_files_differently_are_joined_and_paths_start_from_the_data(tmp_path):
    folder = media.write_images(tmp_path / "images", count=2)
    (tmp_path / "rows.csv").write_text("file,label\nimages/train/upper/0.png,upper\nimages/train/lower/1.png,lower\n")
    data = DataSpec(path="csv", data_files="rows.csv", columns={"image": "file"}, validation=0)
    raw = data.load(task=IMAGES, base_dir=tmp_path)
    unlabelled = Dataset.from_dict({"image": [Image.open(folder / "test/upper/0.png")]})
    prepared = data.prepare({**raw, "unlabelled": unlabelled}, SIXTEEN, task=IMAGES)
    assert [prepared.train[row]["pixel_values"].shape for row in range(3)] == [(3, 16, 16)] * 3


def test_files_named_one_by_one_are_not_searched_for_beside_them(tmp_path):
    media.write_sounds(tmp_path / "sounds", count=4)
    (tmp_path / "metadata.csv").write_text("of,something\nelse,\n")
    files = {split: f"sounds/{split}/*/*.wav" for split in ("train", "validation")}
    raw = DataSpec(path="audiofolder", data_files=files).load(task=SOUNDS, base_dir=tmp_path)
    assert sorted(raw["train"]["label"][:]) == ["high", "high", "low", "low"]


def test_files_beside_the_classes_are_unlabelled(tmp_path):
    folder = media.write_images(tmp_path / "images", count=4)
    for file in [*folder.glob("test/*/*.png")]:
        file.rename(folder / "test" / file.name)
    data = DataSpec(path="imagefolder", data_dir=str(folder))
    prepared = data.prepare(data.load(task=IMAGES), SIXTEEN, task=IMAGES)
    assert prepared.label_names == ["lower", "upper"]
    assert prepared.test is None
    assert "the labels of test are withheld" in prepared.notes[0]


def test_a_sound_without_a_mask_is_padded_to_the_seconds_it_is_cut_to(tmp_path):
    folder = media.write_sounds(tmp_path / "sounds", count=4)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=False)
    data = DataSpec(path="audiofolder", data_dir=str(folder), max_seconds=0.3)
    rows = data.prepare(data.load(task=SOUNDS), extractor, task=SOUNDS).train
    assert {len(rows[row]["input_values"]) for row in range(4)} == {2400}


@pytest.mark.parametrize(
    "extractor",
    [
        ASTFeatureExtractor(sampling_rate=8000, max_length=20, num_mel_bins=16),
        WhisperFeatureExtractor(sampling_rate=8000, feature_size=16, chunk_length=1),
    ],
    ids=lambda extractor: type(extractor).__name__,
)
def test_spectrograms_are_as_long_as_their_extractor_makes_them(extractor, tmp_path):
    folder = media.write_sounds(tmp_path / "sounds", count=4)
    data = DataSpec(path="audiofolder", data_dir=str(folder), max_seconds=0.15)
    prepared = data.prepare(data.load(task=SOUNDS), extractor, task=SOUNDS)
    batch = prepared.collator([prepared.train[row] for row in range(4)])
    expected = (4, 20, 16) if isinstance(extractor, ASTFeatureExtractor) else (4, 16, 50)
    assert batch[extractor.model_input_names[0]].shape == expected


def test_a_row_without_a_file_and_a_table_of_sounds_are_refused(tmp_path):
    train = Dataset.from_dict({"image": [png(grey()), None], "label": ["a", "b"]})
    train = train.map(lambda row: {"image": row["image"] and {"bytes": row["image"], "path": None}})
    with pytest.raises(ConfigurationError, match=r"'image' is missing in 1 of 2 rows of 'train' \(first in row 1\)"):
        DataSpec(path="json").prepare({"train": train}, SIXTEEN, task=IMAGES)
    numbers = Dataset.from_dict({"image": [1, 2], "label": ["a", "b"]})
    with pytest.raises(ConfigurationError, match="'image' of 'train' holds int64: expected files"):
        DataSpec(path="json").prepare({"train": numbers}, SIXTEEN, task=IMAGES)
    folder = media.write_sounds(tmp_path / "sounds", count=2)
    (folder / "train" / "metadata.csv").write_text("file_name,label\nlow/0.wav,low\n")
    with pytest.raises(ConfigurationError, match=r"metadata.csv' is a table of sounds. Read it as one: path: csv"):
        DataSpec(path="audiofolder", data_dir=str(folder)).load(task=SOUNDS)
    with pytest.raises(ConfigurationError, match="A folder of sounds needs none as path: audiofolder"):
        DataSpec(path=str(media.write_sounds(tmp_path / "more", count=2))).load(task=SOUNDS)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"bytes": b"no image", "path": "a.png"}, "'a.png' is no image that can be read"),
        (np.full((4, 4), 300), "an example is no image that can be read: pixels from 300 to 300"),
        (np.full((4, 4), 0.5), "an example is no image that can be read: pixels from 0.5 to 0.5"),
        ("not/there.png", "'not/there.png' is no image that can be read"),
        ({"bytes": png(grey())[:50], "path": None}, "an example is no image that can be read"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(stored, message):
    with pytest.raises(ConfigurationError, match=message):
        read_image(stored)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"bytes": b"no sound", "path": "a.wav"}, "'a.wav' is no sound that can be read"),
        ("not/there.wav", "'not/there.wav' is no sound that can be read"),
        ({"array": np.zeros(0), "sampling_rate": 8000}, r"an example has the shape \(0,\): expected samples"),
        ({"array": np.zeros((2, 9)), "sampling_rate": 8000}, r"has the shape \(2, 9\)"),
        ({"array": np.zeros(9)}, "an example is no sound that can be read"),
    ],
)
def test_a_sound_that_cannot_be_read_is_named(stored, message):
    with pytest.raises(ConfigurationError, match=message):
        read_sound(stored)


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({"max_length": 12}, IMAGES, "data.max_length: image-classification does not read it, only tasks on text do"),
        ({"max_seconds": 1.0}, IMAGES, "data.max_seconds: image-classification does not read it, only tasks on audio"),
        ({"block_size": 8}, SOUNDS, "data.block_size: audio-classification does not read it"),
    ],
)
def test_options_of_another_field_are_refused(options, task, message):
    train = Dataset.from_dict({"image": [grey().tolist()] * 2, "audio": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ConfigurationError, match=message):
        DataSpec(path="json", **options).prepare({"train": train}, SIXTEEN, task=task)


def test_a_missing_column_and_a_length_that_is_none_are_refused(tmp_path):
    folder = media.write_images(tmp_path / "images", count=2)
    with pytest.raises(ConfigurationError, match="'train' has no column 'audio' to be the audio"):
        DataSpec(path="imagefolder", data_dir=str(folder)).load(task=SOUNDS)
    with pytest.raises(ConfigurationError, match=r"data.max_seconds = 0.0: expected more than 0"):
        DataSpec(path="audiofolder", max_seconds=0.0)


def test_a_digest_names_files_and_what_is_done_to_them(tmp_path):
    folder = media.write_images(tmp_path / "images", count=2)
    paths = sorted(map(str, folder.glob("train/*/*.png")))
    rows = Dataset.from_dict({"pixel_values": paths}).cast_column("pixel_values", ImageFeature(decode=False))
    reader = ImageReader(SIXTEEN)
    assert reader.digest(rows) == ImageReader(ViTImageProcessor(size={"height": 16, "width": 16})).digest(rows)
    assert reader.digest(rows) != ImageReader(ViTImageProcessor(size={"height": 8, "width": 8})).digest(rows)
    sounds = rows.rename_column("pixel_values", "input_values")
    assert SoundReader(EIGHT).digest(sounds) != SoundReader(EIGHT, max_seconds=1.0).digest(sounds)
    before = reader.digest(rows)
    os.utime(paths[0], ns=(1, 1))
    assert reader.digest(rows) != before


def test_what_is_cached_of_files_is_named_after_what_is_made_of_them(tmp_path):
    folder = media.write_images(tmp_path / "images", count=2)
    data = DataSpec(path="imagefolder", data_dir=str(folder))

    def digest(size: int) -> str:
        processor = ViTImageProcessor(size={"height": size, "width": size})
        prepared = data.prepare(data.load(task=IMAGES), processor, task=IMAGES)
        inputs = {"main_input": "pixel_values", "inputs": ["pixel_values"]}
        return Batches(prepared.train, prepared.collator, **inputs).digest()

    assert digest(16) == digest(16)
    assert digest(16) != digest(8)


def test_what_a_transform_gives_survives_selection_and_workers(tmp_path):
    folder = media.write_images(tmp_path / "images", count=4)
    data = DataSpec(path="imagefolder", data_dir=str(folder))
    rows = data.prepare(data.load(task=IMAGES), SIXTEEN, task=IMAGES).train
    again = rows.select([2, 0]).remove_columns("labels")
    assert torch.equal(again[1]["pixel_values"], rows[0]["pixel_values"])
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, collate_fn=lambda examples: examples)
    batches = [example["pixel_values"] for batch in loader for example in batch]
    assert torch.equal(torch.stack(batches), torch.stack([rows[row]["pixel_values"] for row in range(4)]))
