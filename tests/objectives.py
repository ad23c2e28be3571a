"""Objectives with everything an objective can have, for the tests of the trainer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from hf_transfer.objectives import Objective
from tests.tiny import tiny_bert


class Critic(Objective):
    """Tells the domain from the mean hidden state: reads a column and hidden states, has weights of its own."""

    name = "critic"
    columns = ("domain",)
    hidden_states = True

    def prepare(self, model: nn.Module) -> None:
        torch.manual_seed(3)
        self.probe = nn.Linear(16, 2)

    def forward(self, model, batch, outputs, progress):
        mask = batch["attention_mask"][..., None]
        pooled = (outputs.hidden_states[-1] * mask).sum(1) / mask.sum(1)
        return functional.cross_entropy(self.probe(pooled), batch["domain"])


class SoftTargets(Objective):
    """A frozen teacher's distribution as target."""

    name = "soft_targets"

    def prepare(self, model: nn.Module) -> None:
        self.teacher = tiny_bert(seed=5).eval().requires_grad_(False)

    def forward(self, model, batch, outputs, progress):
        with torch.no_grad():
            logits = self.teacher(batch["input_ids"], batch["attention_mask"]).logits
        return functional.kl_div(
            outputs.logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
        )


class TokenEntropy(Objective):
    """Mean over label tokens of the prediction's entropy: a term that must be averaged over tokens."""

    name = "token_entropy"
    averaged_over = "labels"

    def forward(self, model, batch, outputs, progress):
        log_probabilities = outputs.logits[:, :-1].log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return entropy[batch["labels"][:, 1:] != -100].mean()
