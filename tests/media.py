"""Folders of tiny images and sounds whose class can be seen or heard, and folders of tiny models that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

RATE = 8000


def image(kind: int, generator: np.random.Generator, *, size: int = 12) -> np.ndarray:
    """Grey noise, brighter in the upper half (0) or the lower one (1)."""
    pixels = generator.integers(0, 120, (size, size))
    half = slice(0, size // 2) if kind == 0 else slice(size // 2, None)
    pixels[half] += 120
    return pixels.astype(np.uint8)


def sound(kind: int, generator: np.random.Generator, *, rate: int = RATE, seconds: float = 0.2) -> np.ndarray:
    """A tone of 300 Hz (0) or 1,200 Hz (1) in noise."""
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (300, 1200)[kind] * time + generator.uniform(0, 6))
    return (0.5 * tone + 0.05 * generator.standard_normal(len(time))).astype(np.float32)


def write_images(folder: Path, *, count: int = 16, mode: str = "L", seed: int = 0) -> Path:
    """``count`` images per split in folder/SPLIT/CLASS/NUMBER.png."""
    generator = np.random.default_rng(seed)
    for split in ("train", "validation", "test"):
        for number in range(count):
            path = folder / split / ("upper", "lower")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(number % 2, generator)).convert(mode).save(path)
    return folder


def write_sounds(folder: Path, *, count: int = 16, rate: int = RATE, seed: int = 0) -> Path:
    """``count`` sounds of 0.1 to 0.2 seconds per split in folder/SPLIT/CLASS/NUMBER.wav."""
    generator = np.random.default_rng(seed)
    for split in ("train", "validation", "test"):
        for number in range(count):
            path = folder / split / ("low", "high")[number % 2] / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = sound(number % 2, generator, rate=rate, seconds=0.1 + 0.1 * generator.random())
            soundfile.write(path, samples, rate)
    return folder


def write_vit(folder: Path, *, seed: int = 0, layers: int = 2, labels: int = 2) -> Path:
    """A Vision Transformer of 16 x 16 pixels and width 16."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        num_labels=labels,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_wav2vec2(folder: Path, *, seed: int = 0, layers: int = 2, labels: int = 2, masked: bool = True) -> Path:
    """A Wav2Vec2 of width 16 that reads 8 kHz, and an attention mask or none."""
    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer" if masked else "group",
        classifier_proj_size=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        num_labels=labels,
    )
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=masked).save_pretrained(folder)
    return folder
