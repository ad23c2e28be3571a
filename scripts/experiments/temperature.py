"""Why the distillation loss carries T^2, and how far that goes: the size of its gradient at several temperatures.

    python scripts/experiments/temperature.py --data DATA --classifier out/distillation/trec/teacher/teacher/seed-0

DATA holds models/stories3M-int8dq, corpora/tinystories_5k.jsonl.gz and sentcls/trec_test.jsonl; the classifier is the
teacher that distillation.py trained. Each teaches a student of some of its own blocks, not yet trained: two of six and
three of six. The gradient is that of the mean forward KL over 16 stories' tokens or 256 questions, in the student's
logits (Hinton et al. 2015, section 2).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from distilled_language_model import read_texts
from few_shot import read

from hf_transfer import ModelSpec, load_tokenizer, load_trained, student_from
from hf_transfer.functional import divergence, temperature_factor

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def logits_of(spec: ModelSpec, texts: list[str], *, layers: int) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's, for every text or every real token of them."""
    batch = load_tokenizer(spec)(texts, return_tensors="pt", padding=True, truncation=True, max_length=256)
    teacher = load_trained(spec)
    if spec.task == "causal-lm":
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        found = [model.eval()(**batch).logits for model in (teacher, student_from(teacher, layers=layers))]
    real = batch["attention_mask"].bool() if found[0].dim() == 3 else ...
    return found[0][real], found[1][real]


def norms(teacher: Tensor, student: Tensor) -> list[float]:
    sizes = []
    for temperature in TEMPERATURES:
        logits = student.clone().requires_grad_()
        divergence(logits, teacher, temperature=temperature).mean().backward()
        assert logits.grad is not None
        sizes.append(float(logits.grad.norm()))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    options = parser.parse_args()
    questions = [row["text"] for row in read(options.data / "sentcls/trec_test.jsonl")][:256]
    stories = read_texts(options.data)["validation"]["text"][:16]
    language_model = ModelSpec(str(options.data / "models/stories3M-int8dq"), task="causal-lm")
    cases = {
        "6 classes": norms(*logits_of(ModelSpec(str(options.classifier)), questions, layers=3)),
        "4,096 tokens": norms(*logits_of(language_model, stories, layers=2)),
    }
    print("| T | " + " | ".join(f"{name}, KL | T^2 KL" for name in cases) + " |\n|---:|" + "---:|---:|" * len(cases))
    for place, temperature in enumerate(TEMPERATURES):
        factor = temperature_factor("forward_kl", temperature)
        shares = [sizes[place] / sizes[0] for sizes in cases.values()]
        print(f"| {temperature:g} | " + " | ".join(f"{share:.3f} | {share * factor:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
