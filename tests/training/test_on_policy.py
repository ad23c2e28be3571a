"""On-policy distillation: what the student writes, what of it is learnt from, and when."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_transfer.batches import EXAMPLE_INDEX
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import Distillation
from hf_transfer.objectives.distillation import ON_POLICY
from hf_transfer.training.distillation import DistillationTrainer
from hf_transfer.training.on_policy import sampled_batch
from tests.tiny import VOCABULARY, arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama

END = 7
GREEDY = {"do_sample": False}


def student(**config):
    """With opinions, and a token that ends its texts."""
    model = tiny_llama(**config)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    model.generation_config.eos_token_id = END
    return model


def prompts_and_answers() -> dict[str, torch.Tensor]:
    """Three rows of a prompt, whose labels are masked, and an answer; the second is padded."""
    ids = torch.tensor([[9, 12, 30, 41, 42, 43], [15, 22, 50, 51, 0, 0], [33, 8, 17, 28, 29, 2]])
    labels = torch.tensor([[-100, -100, -100, 41, 42, 43], [-100, -100, 50, 51, -100, -100], [-100, 8, 17, 28, 29, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "domain": torch.tensor([0, 1, 0])}


def written(model, prompt: list[int], count: int) -> list[int]:
    """Greedily, one row alone and one token after the other, up to the end of the text."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(4))
def test_rows_go_on_from_their_prompts_as_each_would_alone(seed):
    model = student(seed=seed)
    found = sampled_batch(model, prompts_and_answers(), seed=0, max_new_tokens=8, **GREEDY)
    for row, prompt in enumerate(([9, 12, 30], [15, 22], [33])):
        expected = written(model, prompt, 8)
        length = len(prompt) + len(expected)
        assert found["input_ids"][row, :length].tolist() == prompt + expected
        assert found["labels"][row].tolist()[: len(prompt)] == [-100] * len(prompt)
        assert found["labels"][row, len(prompt) : length].tolist() == expected
        assert (found["labels"][row, length:] == -100).all()
        assert found["attention_mask"][row].sum() == length
    assert found["domain"].tolist() == [0, 1, 0]


def test_padding_on_the_left_is_no_prompt():
    """Neither before a prompt nor where every real token has a label."""
    model = student()
    batch = {
        "input_ids": torch.tensor([[0, 0, 9, 12, 30, 41], [0, 15, 22, 50, 51, 52]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, -100, -100, 41], [-100, 15, 22, 50, 51, 52]]),
    }
    found = sampled_batch(model, batch, seed=0, max_new_tokens=4, **GREEDY)
    for row, prompt in enumerate(([9, 12, 30], [15])):
        expected = prompt + written(model, prompt, 4)
        assert found["input_ids"][row, : len(expected)].tolist() == expected


def test_the_checkpoints_own_way_of_generating_has_no_say():
    model, batch = student(), prompts_and_answers()
    expected = sampled_batch(model, batch, seed=0, **GREEDY)["input_ids"]
    own = model.generation_config
    own.repetition_penalty, own.num_beams, own.min_length, own.return_dict_in_generate = 5.0, 3, 9, True
    assert torch.equal(sampled_batch(model, batch, seed=0, **GREEDY)["input_ids"], expected)
    assert model.generation_config is own


def test_texts_end_where_the_model_ends_them():
    model = student()
    with torch.no_grad():
        model.lm_head.weight[END] = 3 * model.lm_head.weight.sum(0) * 0  # equal to none: never the most probable
    assert not (sampled_batch(model, prompts_and_answers(), seed=0, **GREEDY)["labels"] == END).any()
    model.generation_config.eos_token_id = list(range(VOCABULARY))  # every token is an end
    found = sampled_batch(model, prompts_and_answers(), seed=0, **GREEDY)
    assert (found["labels"] != -100).sum(1).tolist() == [1, 1, 1]


def test_rows_grow_to_the_longest_of_the_batch_and_modes_are_kept():
    model = student()
    model.generation_config.eos_token_id = None
    model.train()
    model.model.layers[0].eval()
    found = sampled_batch(model, prompts_and_answers(), seed=0, **GREEDY)
    assert (found["labels"] != -100).sum(1).tolist() == [3, 4, 5]
    assert model.training
    assert not model.model.layers[0].training


def test_tokens_are_drawn_from_the_models_own_distribution():
    model = tiny_llama()
    before = torch.get_rng_state()
    batch = {name: value[:1].repeat(4000, 1) for name, value in prompts_and_answers().items() if value.dim() == 2}
    drawn = sampled_batch(model, batch, seed=0, max_new_tokens=1)["labels"][:, 3]
    with torch.no_grad():
        expected = model(torch.tensor([[9, 12, 30]])).logits[0, -1].softmax(-1)
    found = drawn.bincount(minlength=VOCABULARY) / 4000
    assert (found - expected).abs().max() < 5 * (expected.max() / 4000) ** 0.5
    assert (found > 0).sum() > 50, "no token is cut off"
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_decoder_writes_for_the_same_inputs():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 0
    model = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(4, 60, (2, 6)), "labels": torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100]])}
    found = sampled_batch(model, batch, seed=0, **GREEDY)
    ids = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(batch["input_ids"], decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    for row, labels in zip(ids[:, 1:].tolist(), found["labels"], strict=True):
        end = row.index(1) + 1 if 1 in row else 4
        assert labels[labels != -100].tolist() == row[:end]
    assert torch.equal(found["input_ids"], batch["input_ids"])


def trained(folder, lmbda: float, *, fused: bool = True, **changes):
    seen = []

    class Watching(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Watching(
        student(),
        arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes),
        teacher=student(seed=5),
        alpha=0.7,
        divergence="reverse_kl",
        lmbda=lmbda,
        fused_loss=fused,
        train_dataset=language_rows(16).remove_columns("domain"),
        data_collator=collate,
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_only_the_divergence_counts_where_the_student_wrote(fused, tmp_path):
    trainer, seen = trained(tmp_path, 1.0, fused=fused)
    assert all(ON_POLICY in batch for batch in seen)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.7 * first["distillation_loss"], rel=1e-4)

    objective, model, total = Distillation(student(seed=5), divergence="reverse_kl"), student(), 0.0
    objective.prepare(model)
    counts = []
    for batch in seen[:2]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        total += counts[-1] * objective(model, batch, model(**inputs), 0.0).item()
    assert first["distillation_loss"] == pytest.approx(total / sum(counts), rel=1e-4)


def test_a_share_of_the_batches_is_the_students_and_a_resumed_run_chooses_the_same(tmp_path):
    _, none = trained(tmp_path / "none", 0.0)
    assert not any(ON_POLICY in batch for batch in none)
    changes = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 5}
    trainer, seen = trained(tmp_path / "half", 0.5, **changes)
    chosen = [ON_POLICY in batch for batch in seen]
    assert 0.25 < sum(chosen) / len(chosen) < 0.75
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-10"))
    assert [ON_POLICY in batch for batch in seen[len(chosen) :]] == chosen[20:]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"lmbda = 1\.5: expected a share between 0"):
        DistillationTrainer(student(), teacher=student(seed=5), lmbda=1.5)
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification does not write texts"):
        DistillationTrainer(
            tiny_bert(), arguments(tmp_path), teacher=tiny_bert(seed=5), lmbda=0.5, train_dataset=text_rows(4)
        )
    from hf_transfer.teacher_store import TeacherStore

    rows = language_rows(6).remove_columns("domain")
    store = TeacherStore.build(student(seed=5), rows, collate, directory=tmp_path / "store", k=8)
    with pytest.raises(ConfigurationError, match="lmbda = 0.5: distillation"):
        DistillationTrainer(
            student(), arguments(tmp_path), teacher=store, lmbda=0.5, train_dataset=rows, data_collator=collate
        )
    assert EXAMPLE_INDEX not in rows.column_names
