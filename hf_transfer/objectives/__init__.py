"""Terms of a training loss: one file per family, one registry line per objective."""

from __future__ import annotations

from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.cross_tokenizer import CrossTokenizerDistillation
from hf_transfer.objectives.distillation import Distillation
from hf_transfer.objectives.domains import CORAL, MMD, ConditionalAdversarial, DomainAdversarial, JointMMD
from hf_transfer.objectives.forgetting import L2SP
from hf_transfer.objectives.inner import AttentionMatching, HiddenStateMatching
from hf_transfer.objectives.stored import StoredDistillation
from hf_transfer.objectives.teacher import Teacher

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        L2SP,
        HiddenStateMatching,
        AttentionMatching,
        DomainAdversarial,
        ConditionalAdversarial,
        MMD,
        JointMMD,
        CORAL,
    )
}
"""What a recipe's ``objectives:`` section can name."""

__all__ = [
    "CORAL",
    "L2SP",
    "MMD",
    "OBJECTIVES",
    "AttentionMatching",
    "ConditionalAdversarial",
    "CrossTokenizerDistillation",
    "Distillation",
    "DomainAdversarial",
    "HiddenStateMatching",
    "JointMMD",
    "Objective",
    "StoredDistillation",
    "Teacher",
]
