"""What is read from the store is what was written, and nothing incomplete or stale can be taken for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from hf_transfer.activations import Activations, ActivationWriter, columns_digest, fingerprint, tensors_digest
from hf_transfer.errors import ConfigurationError

LENGTHS = [3, 1, 4, 2, 5]


def examples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 6, generator=generator) for length in LENGTHS]


def batch_of(rows: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, T, D) with rubbish at padding, and the real positions (B, T)."""
    hidden = torch.full((len(rows), 7, 6), 99.0)
    real = torch.zeros(len(rows), 7, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(7 - len(row), 7) if left else slice(0, len(row))
        hidden[index, place], real[index, place] = row, True
    return hidden, real


def write(path, *, dtype=torch.float32, order=(4, 0, 2, 1, 3), fail=False) -> None:
    rows = examples()
    with ActivationWriter(path, examples=len(rows), dtype=dtype) as writer:
        for chosen in torch.tensor(order).split(2):
            hidden, real = batch_of([rows[index] for index in chosen], left=bool(chosen[0] == 2))
            writer.append(chosen, Activations.pack(hidden, real))
            if fail:
                raise RuntimeError("killed")


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_where_the_batch_has_room_for_them(tmp_path, dtype, left):
    write(tmp_path / "rows.safetensors", dtype=dtype)
    stored = Activations.open(tmp_path / "rows.safetensors")
    rows = examples()
    chosen = torch.tensor([1, 4, 1, 3])
    expected, real = batch_of([rows[index].to(dtype) for index in chosen], left=left)
    expected = expected.to(dtype).masked_fill(~real.unsqueeze(-1), 0)
    assert torch.equal(stored.padded(chosen, real), expected)
    assert stored.values.dtype == dtype
    assert stored.lengths.tolist() == LENGTHS


def test_file_is_ordinary_safetensors(tmp_path):
    write(tmp_path / "rows.safetensors")
    tensors = load_file(tmp_path / "rows.safetensors")
    start = tensors["starts"][2]
    assert torch.equal(tensors["values"][start : start + 4], examples()[2])


def test_values_are_mapped_not_read(tmp_path):
    """Reading one example of a file of 256 MB must not bring the file into memory."""
    path = tmp_path / "large.safetensors"
    block = Activations(torch.zeros(1 << 20, 16), torch.tensor([0]), torch.tensor([1 << 20]))
    with ActivationWriter(path, examples=4, dtype=torch.float32) as writer:
        for index in range(4):
            writer.append(torch.tensor([index]), block)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from hf_transfer.activations import Activations\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stored = Activations.open(Path(sys.argv[1]))\n"
        "stored.values[stored.starts[2]].sum()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout)
    assert path.stat().st_size > 256e6
    assert grown * 1024 < 32e6


def test_an_interrupted_run_leaves_nothing_to_be_taken_for_complete(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path / "rows.safetensors", fail=True)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_file_of_that_name(tmp_path):
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from hf_transfer.activations import Activations, ActivationWriter\n"
        "writer = ActivationWriter(Path(sys.argv[1]), examples=2, dtype=torch.float32).__enter__()\n"
        "writer.append(torch.tensor([0]), Activations(torch.ones(3, 6), torch.tensor([0]), torch.tensor([3])))\n"
        "os._exit(9)\n"
    )
    path = tmp_path / "rows.safetensors"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 9
    assert not path.exists()


@pytest.mark.parametrize("kept", [0.5, 0.99, 0.001])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "rows.safetensors"
    write(path)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(ConfigurationError, match="cut short.*delete it"):
        Activations.open(path)


def test_examples_with_other_lengths_than_stored_are_refused(tmp_path):
    write(tmp_path / "rows.safetensors")
    stored = Activations.open(tmp_path / "rows.safetensors")
    _, real = batch_of([examples()[0]], left=False)
    with pytest.raises(ConfigurationError, match=r"\[3\] real tokens.*\[4\]"):
        stored.padded(torch.tensor([2]), real)


def test_tensors_digest_sees_every_bit():
    def digest(**changes):
        return tensors_digest({"weight": torch.arange(6.0).view(2, 3), "flag": torch.tensor(True), **changes})

    assert digest() == digest()
    changed = torch.arange(6.0).view(2, 3)
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    different = [
        digest(weight=changed),
        digest(weight=torch.arange(6.0).view(3, 2)),
        digest(weight=torch.arange(6.0).view(2, 3).T),
        digest(weight=torch.arange(6.0).view(2, 3).bfloat16()),
        digest(flag=torch.tensor(False)),
        digest(other=torch.zeros(1)),
    ]
    assert len({digest(), *different}) == len(different) + 1


def test_columns_digest_is_of_the_content(tmp_path):
    rows = [{"input_ids": [index, 2 * index, 7][: 1 + index % 3], "labels": index} for index in range(50)]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    again = load_from_disk(tmp_path / "saved")
    digest = columns_digest(dataset, ["input_ids"])

    assert again._fingerprint != dataset._fingerprint  # which is why it cannot be used
    assert columns_digest(again, ["input_ids"]) == digest
    assert columns_digest(dataset.with_format("torch"), ["input_ids"]) == digest
    assert columns_digest(dataset.remove_columns("labels"), ["input_ids"]) == digest
    mixed = dataset.shuffle(seed=1)
    assert columns_digest(mixed, ["input_ids"]) == columns_digest(mixed.flatten_indices(), ["input_ids"]) != digest
    assert columns_digest(dataset.select(range(10, 20)), ["input_ids"]) == columns_digest(
        Dataset.from_list(rows[10:20]), ["input_ids"]
    )
    rows[30]["input_ids"][0] += 1
    assert columns_digest(Dataset.from_list(rows), ["input_ids"]) != digest


def test_fingerprint_is_the_same_in_every_process():
    """Sets, which PEFT's configurations hold, are written in another order by every process."""
    code = "from hf_transfer.activations import fingerprint; print(fingerprint({'query', 'key', 'value', 'dense'}))"
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert len(names) == 1
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
