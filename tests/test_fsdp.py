"""What FSDP2 changes about a model: parameters become shards, and checkpointed blocks are wrapped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_transfer.objectives import L2SP
from hf_transfer.schedules import GradualUnfreeze
from hf_transfer.training.unfreezing import TrainableLevels
from tests.tiny import tiny_bert


def moved_model() -> tuple[torch.nn.Module, L2SP]:
    """A model that has left its anchor by 0.1 in every weight."""
    model = tiny_bert()
    objective = L2SP()
    objective.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model, objective


def anchor_gradients(model: torch.nn.Module, objective: L2SP) -> tuple[float, dict[str, torch.Tensor]]:
    value = objective(model, {}, None, 0.0)
    value.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in gradients.items()}
    return value.item(), whole


def test_l2sp_over_two_shards_is_l2sp_of_the_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "tests.test_fsdp", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    value, gradients = anchor_gradients(*moved_model())
    for rank in range(2):
        sharded = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sharded["world"] == 2
        assert abs(sharded["value"] - value) < 1e-5 * value
        assert sharded["norms"].keys() == gradients.keys()
        for name, norm in sharded["norms"].items():
            assert abs(norm - gradients[name].norm().item()) < 1e-6, name


def test_levels_open_under_activation_checkpointing() -> None:
    """FSDP's wrapper puts a part of its own into every name inside a block."""
    model = tiny_bert()
    levels = TrainableLevels(model, GradualUnfreeze(until=1.0))
    blocks = model.bert.encoder.layer
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    levels.follow(0.5, epochs=4)
    levels.eval_frozen()
    opened = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    assert opened == [False, True, True]
    assert [block._checkpoint_wrapped_module.training for block in blocks] == opened


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, objective = moved_model()
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    value, gradients = anchor_gradients(model, objective)
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    record = {"world": torch.distributed.get_world_size(), "value": value, "norms": norms}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()
