"""Every recipe on images and on sounds, from folders of files to a run folder that plain transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModelForAudioClassification, ViTImageProcessor
from transformers import AutoModelForImageClassification as AutoModelForImages

from hf_transfer.data.media import ImageReader, SoundReader
from hf_transfer.errors import ConfigurationError
from hf_transfer.recipe import Recipe
from tests import media

METHODS = {
    "fine_tune": {},
    "gradual_unfreeze": {},
    "lora": {"merge_adapter": True},
    "feature_extraction": {},
    "distillation": {},
    "domain_adversarial": {"conditional": True},
    "domain_alignment": {},
}


class Field:
    """Folders of one kind of file and of models that read them."""

    def __init__(self, name, folder):
        images = name == "image"
        self.task, self.format = f"{name}-classification", f"{name}folder"
        write, write_model = (
            (media.write_images, media.write_vit) if images else (media.write_sounds, media.write_wav2vec2)
        )
        self.data = write(folder / "data")
        self.target = media.write_images(folder / "target", mode="RGB", seed=1) if images else None
        self.target = self.target or media.write_sounds(folder / "target", rate=16000, seed=1)
        self.model, self.teacher = write_model(folder / "model"), write_model(folder / "teacher", seed=5)
        self.auto = AutoModelForImages if images else AutoModelForAudioClassification
        self.processor = AutoImageProcessor if images else AutoFeatureExtractor
        self.reader = ImageReader if images else SoundReader

    def section(self, folder):
        cut = {"max_seconds": 0.2} if self.task.startswith("audio") and folder == self.data else {}
        return {"path": self.format, "data_dir": str(folder), **cut}

    def values(self, method, output, **changes):
        data = self.section(self.data)
        if method.startswith("domain"):
            data = {"source": data, "target": self.section(self.target)}
        teacher = {"teacher": {"name": str(self.teacher)}} if method == "distillation" else {}
        return {
            "recipe": method,
            "model": {"name": str(self.model), "task": self.task},
            "data": data,
            "training": {
                "output_dir": str(output),
                "num_train_epochs": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "eval_strategy": "epoch",
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
            },
            **teacher,
            **METHODS.get(method, {}),
            **changes,
        }


@pytest.fixture(params=["image", "audio"], scope="module")
def field(request, tmp_path_factory):
    return Field(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_model_that_transformers_loads(field, method, tmp_path):
    result = Recipe.from_values(field.values(method, tmp_path / "run")).run()
    model = field.auto.from_pretrained(tmp_path / "run").eval()
    reader = field.reader(field.processor.from_pretrained(tmp_path / "run"))
    classes = json.loads((tmp_path / "run" / "run.json").read_text())["labels"]
    assert [model.config.id2label[number] for number in range(2)] == classes
    right = 0
    folder = field.target if method.startswith("domain") else field.data
    files = sorted(folder.glob("test/*/*"))
    for file in files:
        inputs = torch.as_tensor(reader({reader.name: [str(file)]})[reader.name][0])[None]
        with torch.no_grad():
            right += classes[int(model(inputs).logits.argmax())] == file.parent.name
    assert result.metrics["test"]["accuracy"] == pytest.approx(right / len(files))
    if method.startswith("domain"):
        assert set(result.metrics["selection"]) == {"source", "honest", "oracle"}


def test_what_can_be_learned_is(field, tmp_path):
    changes = {"unfreeze": {"blocks": 2}, "frozen_prefix_cache": str(tmp_path / "cache")}
    values = field.values("fine_tune", tmp_path / "run", **changes)
    values["training"] |= {"num_train_epochs": 20, "learning_rate": 1e-2}
    result = Recipe.from_values(values).run(save=False)
    assert result.metrics["test"]["accuracy"] >= 0.9


def test_sounds_are_cached_for_a_model_that_reads_no_mask(tmp_path):
    field = Field("audio", tmp_path)
    media.write_wav2vec2(field.model, masked=False)
    frozen = {"unfreeze": {"blocks": 1}}
    cached = {**frozen, "frozen_prefix_cache": str(tmp_path / "cache"), "frozen_prefix_dtype": "float32"}
    plain, found = (
        Recipe.from_values(field.values("fine_tune", tmp_path / name, **changes)).run().metrics["test"]["loss"]
        for name, changes in (("plain", frozen), ("cached", cached))
    )
    assert found == pytest.approx(plain, rel=1e-5)
    assert Recipe.from_values(field.values("feature_extraction", tmp_path / "features")).run().metrics["test"]


def test_a_teachers_answers_to_files_are_stored(field, tmp_path):
    values = field.values("distillation", tmp_path / "run", store={"directory": str(tmp_path / "store")})
    recipe = Recipe.from_values(values)
    assert len(recipe.teach()) == 16
    assert recipe.run().metrics["test"]


def test_a_teacher_with_another_processor_is_refused(tmp_path):
    field = Field("image", tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3).save_pretrained(field.teacher)
    with pytest.raises(ConfigurationError, match=r"its processor has image_mean = .0.4, 0.4, 0.4., the student's"):
        Recipe.from_values(field.values("distillation", tmp_path / "run")).run()


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_transfer.models._MEDIA", {"image": ("no_such_package", "vision", "AutoImageProcessor")})
    field = Field("image", tmp_path)
    with pytest.raises(ConfigurationError, match=r"it needs no_such_package: pip install .*\[vision\]"):
        Recipe.from_values(field.values("fine_tune", tmp_path / "run")).run()


def test_a_model_without_a_processor_is_refused(field, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text((field.model / "config.json").read_text())
    values = field.values("fine_tune", tmp_path / "run")
    values["model"]["name"] = str(text)
    with pytest.raises(ConfigurationError, match="that can be loaded"):
        Recipe.from_values(values).run()
