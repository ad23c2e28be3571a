"""The environment report says what is there, and finds the other package of our import name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import hf_transfer
from hf_transfer.environment import environment, name_clash, version, versions

PACKAGE = Path(hf_transfer.__file__).parent


def test_versions_are_what_the_packages_say_of_themselves():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["hf-transfer-learning"] == hf_transfer.__version__
    assert found["python"] == sys.version.split()[0]
    assert version("no-such-distribution-anywhere") is None


def test_versions_import_nothing_heavy():
    code = "import sys; from hf_transfer.environment import versions; versions(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_device_is_listed_with_its_bf16_support():
    report = environment()
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        assert "bf16" in report[device]
    assert report["bitsandbytes"].startswith(version("bitsandbytes") or "not installed")


def test_our_own_distribution_is_no_clash():
    assert name_clash() is None


def test_the_download_accelerator_is_known_by_its_metadata(tmp_path, monkeypatch):
    metadata = tmp_path / "hf_transfer-0.1.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: hf_transfer\nVersion: 0.1.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    clash = name_clash()
    assert clash is not None
    assert "0.1.9" in clash
    assert "pip uninstall hf_transfer" in clash


def test_the_download_accelerator_is_known_by_what_it_leaves_in_our_folder(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hf_transfer", ignore=shutil.ignore_patterns("__pycache__"))
    left_behind = tmp_path / "hf_transfer" / "hf_transfer.abi3.so"
    left_behind.touch()
    code = "from hf_transfer.environment import name_clash; print(name_clash())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert str(left_behind) in run.stdout, run.stderr
