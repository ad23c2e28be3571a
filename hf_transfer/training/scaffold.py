"""Trains and keeps what teaches the model but does not ship with it: the objectives' own weights and state."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives.base import Objective

STATE_NAME = "scaffold.safetensors"
OPTIMIZER_NAME = "scaffold_optimizer.pt"


class Scaffold:
    """The objectives' parameters with an optimizer of their own, beside the Trainer's.

    A critic inside the model would ship with it and breaks DDP when it is called outside the model's forward; a critic
    in the main optimizer is never averaged over ranks and is a ``KeyError`` under FSDP2. Here its gradients are
    averaged over ranks once per optimizer step, clipped to ``max_grad_norm``, applied at the rate that the model's
    schedule is at, and zeroed. State is saved for resuming, in files that are not a model's and hence never ship.

    Args:
        objectives: The terms of the run, already prepared for the model.
        args: For learning rate, weight decay, Adam's constants and the clipping norm.
        accelerator: For the collectives.
    """

    def __init__(self, objectives: list[Objective], args: TrainingArguments, accelerator: Accelerator) -> None:
        self.objectives = nn.ModuleList(objectives).to(args.device)
        self._accelerator = accelerator
        self._max_grad_norm = args.max_grad_norm
        self._parameters = [parameter for parameter in self.objectives.parameters() if parameter.requires_grad]
        self._optimizer = None
        if self._parameters:
            self._optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "initial_lr": objective.learning_rate or args.learning_rate}
                    for objective in objectives
                    if (parameters := [parameter for parameter in objective.parameters() if parameter.requires_grad])
                ],
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )

    def synchronize(self) -> None:
        """Give every rank the first rank's parameters and buffers."""
        for tensor in self._state().values():
            tensor.copy_(broadcast(tensor.clone(), from_process=0))

    def step(self, rate_factor: float) -> None:
        """One optimizer step on the gradients gathered since the last, at ``rate_factor`` times the initial rates."""
        if self._optimizer is None:
            return
        gradient = torch.cat(
            [
                (parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad).flatten()
                for parameter in self._parameters
            ]
        )
        gradient = self._accelerator.reduce(gradient, reduction="mean")
        if self._accelerator.scaler is not None:
            gradient = gradient / self._accelerator.scaler.get_scale()
        if not torch.isfinite(gradient).all():
            self._optimizer.zero_grad()
            return
        if self._max_grad_norm > 0:
            gradient = gradient * (self._max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, piece in zip(self._parameters, gradient.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write parameters, buffers and optimizer state into a checkpoint ``folder``."""
        state = {name: tensor.contiguous() for name, tensor in self._state().items()}
        save_file(state, Path(folder) / STATE_NAME)
        if self._optimizer is not None:
            torch.save(self._optimizer.state_dict(), Path(folder) / OPTIMIZER_NAME)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigurationError: The checkpoint was written without these objectives.
        """
        path = Path(folder) / STATE_NAME
        names = ", ".join(objective.name for objective in self.objectives)  # type: ignore[misc]
        if not path.is_file():
            raise ConfigurationError(f"{folder} has no {STATE_NAME}: not saved by a run with objectives {names}.")
        state, expected = load_file(path), self._state()
        if set(state) != set(expected):
            raise ConfigurationError(
                f"{path} belongs to other objectives than {names}: "
                f"found {sorted(set(state) - set(expected))}, missing {sorted(set(expected) - set(state))}."
            )
        self.objectives.load_state_dict(state, strict=False)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(torch.load(Path(folder) / OPTIMIZER_NAME, weights_only=True))

    def _state(self) -> dict[str, torch.Tensor]:
        """What learns, and the objectives' own buffers; a frozen network inside one is given, not learnt."""
        networks = [module for module in self.objectives.modules() if isinstance(module, PreTrainedModel)]
        frozen = [network for network in networks if not any(each.requires_grad for each in network.parameters())]
        given = {id(tensor) for network in frozen for tensor in (*network.parameters(), *network.buffers())}
        state = self.objectives.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in given}
