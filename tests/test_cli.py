"""The command: what it prints, where, and how it ends; with one process and with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hf_transfer.cli import app
from tests.folders import write_classifier, write_encoder, write_sentiment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    values = {
        "recipe": "gradual_unfreeze",
        "model": {"name": str(write_encoder(root / "encoder"))},
        "data": {"path": "json", "data_files": write_sentiment(root / "data")},
        "layer_decay": 0.9,
        "training": {
            "output_dir": str(root / "run"),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "adam_epsilon": 1e-3,
            "use_cpu": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(launcher or ("-m",)), "hf_transfer", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT, timeout=300)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_run_takes_overrides_and_a_folder(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    done = invoke("run", recipe, "training.num_train_epochs=1", "unfreeze.until=0.5", "--output", folder)
    assert done.exit_code == 0, done.output
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (stored["training"]["num_train_epochs"], stored["unfreeze"]) == (1, {"until": 0.5})
    assert "gradual_unfreeze: 1 process on cpu" in done.stdout
    assert str(folder) in done.stdout

    again = invoke("run", folder / "recipe.yaml")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert invoke("run", folder / "recipe.yaml", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.lerning_rate=1",
            "training.lerning_rate = 1: there is no such option. Did you mean 'learning_rate'?",
        ),
        ("training.learning_rate=fast", "training.learning_rate = 'fast': expected a number."),
        ("training.seed", "Override 'training.seed': expected key.path=value, such as training.seed=1."),
    ],
)
def test_a_refusal_is_one_message_and_exit_code_2(recipe: Path, override: str, message: str) -> None:
    done = invoke("run", recipe, override)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"Error: {message}\n")


def test_describe_lists_methods_and_options() -> None:
    listed = invoke("describe").stdout
    assert all(name in listed for name in ("feature_extraction", "lora", "compare", "l2sp", "training", "adapter"))
    assert "unfreeze.until" in invoke("describe", "gradual_unfreeze").stdout
    assert "learning_rate" in invoke("describe", "training").stdout
    assert "init_lora_weights" in invoke("describe", "adapter.lora").stdout
    assert "Li et al. 2018" in invoke("describe", "l2sp").stdout
    refused = invoke("describe", "l2ps")
    assert (refused.exit_code, refused.stderr) == (2, "Error: 'l2ps' is no method. Did you mean 'l2sp'?\n")


def test_env_names_the_versions() -> None:
    done = invoke("env")
    assert done.exit_code == 0
    assert "transformers: 5" in done.stdout


def test_help_lists_the_commands() -> None:
    printed = invoke("--help").stdout
    assert all(command in printed for command in ("run", "teach", "describe", "env"))


def test_a_teacher_runs_once_and_is_found_again(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values |= {"recipe": "distillation", "teacher": {"name": str(write_classifier(tmp_path / "teacher"))}}
    path = tmp_path / "distillation.yaml"
    path.write_text(yaml.safe_dump(values))
    refused = invoke("teach", path)
    assert refused.exit_code == 2
    assert "store is missing" in refused.output
    for _ in range(2):
        done = invoke("teach", path, f"store.directory={tmp_path / 'store'}")
        assert done.exit_code == 0, done.output
        assert f"32 examples, 32 predictions, in {tmp_path / 'store'}" in done.stdout
    assert invoke("teach", recipe).exit_code == 2, "a recipe without a teacher"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, hf_transfer.cli; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_a_refusal_has_no_traceback(recipe: Path) -> None:
    done = start("run", recipe.parent / "recip.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: Recipe '")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_are_two_and_equal_one(recipe: Path, tmp_path: Path, launcher: str) -> None:
    single = start("run", recipe, "--output", tmp_path / "one")
    assert single.returncode == 0, single.stderr
    launch = {
        "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"),
        "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"),
    }[launcher]
    if launcher == "torchrun":
        launch += ("--rdzv_endpoint=localhost:0", "--redirects=1:3", f"--log-dir={tmp_path / 'logs'}")
    half = "training.per_device_train_batch_size=4"
    double = start(
        "run", recipe, half, "--output", tmp_path / "two", launcher=("-m", *launch, "-m"), ACCELERATE_USE_CPU="true"
    )
    assert double.returncode == 0, double.stderr
    assert double.stdout.count("gradual_unfreeze: 2 processes on cpu") == 1
    assert double.stdout.count("written to") == 1
    second = [path for path in (tmp_path / "logs").rglob("std*") if path.parent.name == "1"]
    assert len(second) == (2 if launcher == "torchrun" else 0)
    assert [path.read_text() for path in second] == [""] * len(second)
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (run["processes"], run["finished"]) == (2, True)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for split in ("validation", "test"):
        assert two[split] == pytest.approx(one[split], abs=1e-5)


@pytest.mark.slow
def test_two_processes_refuse_once(recipe: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d")
    done = start(
        "run",
        recipe,
        "data.pth=x",
        launcher=(*launcher, "--rdzv_endpoint=localhost:0", "-m"),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode != 0
    assert done.stderr.count("data.pth = 'x'") == 1
