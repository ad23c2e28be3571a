"""Matching hidden states and attention: the formulas against plain loops, and what training does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import AttentionMatching, HiddenStateMatching, Teacher
from hf_transfer.objectives.inner import attention_distance, hidden_state_distance
from hf_transfer.students import student_from
from hf_transfer.training.trainer import TransferTrainer
from tests.launched import Recorder
from tests.test_depth import FAMILIES, make, random_inputs
from tests.tiny import arguments, collate, text_rows, tiny_bert

LENGTHS = (5, 2, 4)
REAL = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_distance_of_hidden_states_is_the_formula():
    student, teacher = random(3, 5, 4, seed=0), random(3, 5, 4, seed=1)
    expected = 0.0
    for example, length in enumerate(LENGTHS):
        for token in range(length):
            for axis in range(4):
                gap = float(student[example, token, axis] - teacher[example, token, axis])
                expected += gap**2 / 4 / length / 3
    assert hidden_state_distance(student, teacher, REAL).item() == pytest.approx(expected, rel=1e-6)


def test_cosine_distance_of_hidden_states_is_the_formula():
    student, teacher = random(3, 5, 4, seed=0), random(3, 5, 4, seed=1)
    expected = 0.0
    for example, length in enumerate(LENGTHS):
        for s, t in zip(student[example, :length].tolist(), teacher[example, :length].tolist(), strict=True):
            product = sum(a * b for a, b in zip(s, t, strict=True))
            sizes = sum(a * a for a in s) ** 0.5 * sum(b * b for b in t) ** 0.5
            expected += (1 - product / sizes) / length / 3
    found = hidden_state_distance(student, teacher, REAL, distance="cosine")
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert hidden_state_distance(3 * teacher, teacher, REAL, distance="cosine").item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("heads", [2, 3])
def test_distance_of_attention_is_the_formula(heads):
    student, teacher = random(3, 2, 5, 5, seed=0).softmax(-1), random(3, heads, 5, 5, seed=1).softmax(-1)
    pairs = [(student[:, head], teacher[:, head]) for head in range(2)]
    if heads != 2:
        pairs = [(student.mean(1), teacher.mean(1))]
    expected = 0.0
    for ours, theirs in pairs:
        for example, length in enumerate(LENGTHS):
            for query in range(length):
                for key in range(length):
                    gap = float(ours[example, query, key] - theirs[example, query, key])
                    expected += gap**2 / length**2 / len(pairs) / 3
    assert attention_distance(student, teacher, REAL).item() == pytest.approx(expected, rel=1e-6)


def test_padding_says_nothing_not_even_when_it_is_no_number():
    states, others = random(3, 5, 4, seed=0), random(3, 5, 4, seed=1)
    nothing = states.masked_fill(~REAL[..., None], torch.nan).requires_grad_()
    found = hidden_state_distance(nothing, others, REAL)
    assert found.item() == pytest.approx(hidden_state_distance(states, others, REAL).item())
    maps, other_maps = (random(3, 2, 5, 5, seed=seed).softmax(-1) for seed in (2, 3))
    hidden = ~(REAL[:, None, :, None] & REAL[:, None, None, :])
    found = attention_distance(maps.masked_fill(hidden, torch.nan), other_maps, REAL)
    assert found.item() == pytest.approx(attention_distance(maps, other_maps, REAL).item())
    assert hidden_state_distance(states, others, torch.zeros_like(REAL)).item() == 0


def eager(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    model.set_attn_implementation("eager")
    for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model.eval()


def outputs_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch, output_hidden_states=True, output_attentions=True)


def batch_for(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    batch = random_inputs(model, seed=0)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 4:] = 0
    return batch


TASKS = {"bert": "", "llama": "CausalLM", "gpt2": "CausalLM", "t5": "Seq2SeqLM", "bart": "Seq2SeqLM",
         "vit": "ImageClassification", "wav2vec2": "CTC", "whisper": "SpeechSeq2Seq"}  # fmt: skip


@pytest.mark.parametrize("objective", [HiddenStateMatching, AttentionMatching])
@pytest.mark.parametrize("family", TASKS)
def test_nothing_between_a_model_and_its_copy_and_something_to_another(family, objective):
    teacher = eager(make(family, TASKS[family]))
    copy = eager(student_from(teacher, layers=range(1, FAMILIES[family].blocks + 1)))
    batch = batch_for(teacher)
    term = objective(teacher)
    term.prepare(copy)
    assert not list(term.parameters())
    assert term(copy, batch, outputs_of(copy, batch), 0.0).item() == 0
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert term(copy, batch, outputs_of(copy, batch), 0.0).item() > 1e-7


def test_dropout_of_the_students_attention_is_refused():
    student = eager(tiny_bert(seed=1))
    student.config.attention_probs_dropout_prob = 0.1
    with pytest.raises(ConfigurationError, match=r"attention_probs_dropout_prob is 0\.1"):
        AttentionMatching(eager(tiny_bert())).prepare(student)


def test_the_mean_over_the_mapped_layers_and_real_tokens():
    """A student of one block, whose block learns from the teacher's third, against the states written out."""
    teacher, student = tiny_bert(), tiny_bert(layers=1, seed=1)
    batch = collate(list(text_rows(4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    term = HiddenStateMatching(teacher)
    term.prepare(student)
    found = term(student, batch, student(**inputs, output_hidden_states=True), 0.0)
    ours = student(**inputs, output_hidden_states=True).hidden_states
    theirs = teacher(**inputs, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    expected = [hidden_state_distance(ours[a], theirs[b], real).item() for a, b in ((0, 0), (1, 3))]
    assert found.item() == pytest.approx(sum(expected) / 2)
    term = HiddenStateMatching(teacher, layers={1: 2}, distance="cosine")
    term.prepare(student)
    found = term(student, batch, student(**inputs, output_hidden_states=True), 0.0)
    assert found.item() == pytest.approx(hidden_state_distance(ours[1], theirs[2], real, distance="cosine").item())


def test_attention_reads_the_mapped_layers():
    teacher, student = (tiny_bert(layers=n, seed=n, attn_implementation="eager") for n in (3, 1))
    batch = collate(list(text_rows(4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    term = AttentionMatching(teacher)
    term.prepare(student)
    outputs = student(**inputs, output_attentions=True)
    expected = attention_distance(
        outputs.attentions[0], teacher(**inputs, output_attentions=True).attentions[2], inputs["attention_mask"].bool()
    )
    assert term(student, batch, outputs, 0.0).item() == pytest.approx(expected.item())


def test_halves_of_an_encoder_decoder_are_matched_apart_under_their_own_masks():
    teacher = make("t5", "Seq2SeqLM")
    student = student_from(teacher, layers=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100]])
    batch = {**batch_for(teacher), "labels": labels}
    del batch["decoder_input_ids"]
    term = HiddenStateMatching(teacher, layers="last")
    term.prepare(student)
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    expected = [
        hidden_state_distance(
            ours.encoder_hidden_states[1], theirs.encoder_hidden_states[3], batch["attention_mask"] > 0
        ),
        hidden_state_distance(ours.decoder_hidden_states[1], theirs.decoder_hidden_states[2], labels != -100),
    ]
    assert term(student, batch, ours, 0.0).item() == pytest.approx(sum(expected).item() / 2)


def wide_bert(*, layers: int = 4, heads: int = 3, **config: Any) -> transformers.PreTrainedModel:
    """A teacher that is wider and deeper than ``tiny_bert`` and looks with more heads."""
    torch.manual_seed(9)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=32,
            max_position_embeddings=32,
            num_labels=3,
            attn_implementation="eager",
            **config,
        )
    )


def test_another_width_is_reached_by_a_linear_map_for_each_layer():
    teacher, student = wide_bert(), tiny_bert()
    batch = collate(list(text_rows(4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    term = HiddenStateMatching(teacher, layers={1: 2, 3: 4})
    term.prepare(student)
    assert {name: tuple(weight.shape) for name, weight in term.named_parameters()} == {
        "projections.1.weight": (24, 16),
        "projections.3.weight": (24, 16),
    }
    ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    expected = [
        hidden_state_distance(ours[m] @ term.projections[str(m)].weight.T, theirs[n], batch["attention_mask"] > 0)
        for m, n in ((1, 2), (3, 4))
    ]
    found = term(student, batch, student(**inputs, output_hidden_states=True), 0.0)
    assert found.item() == pytest.approx((sum(expected) / 2).item())


def test_gradients_reach_the_student_and_the_maps_and_not_the_teacher():
    teacher, student = wide_bert(), tiny_bert(attn_implementation="eager")
    batch = collate(list(text_rows(4)))
    hidden, attention = HiddenStateMatching(teacher), AttentionMatching(teacher, layers={3: 4})
    for term in (hidden, attention):
        term.prepare(student)
    outputs = outputs_of(student, {name: batch[name] for name in ("input_ids", "attention_mask")})
    attention(student, batch, outputs, 0.0).backward(retain_graph=True)
    top = student.bert.encoder.layer[2]
    assert top.attention.self.query.weight.grad.abs().sum() > 0
    assert top.output.dense.weight.grad is None  # above the attention that is matched
    student.zero_grad()
    hidden(student, batch, outputs, 0.0).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hidden.parameters())
    assert all(
        parameter.grad.abs().sum() > 0
        for name, parameter in student.bert.encoder.named_parameters()
        if "key.bias" not in name
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def trained(folder: Any, *, batch: int, accumulate: int) -> tuple[TransferTrainer, transformers.PreTrainedModel, list]:
    """A run of both terms with one teacher, and the record and the count of its forward passes."""
    teacher, student = wide_bert(), tiny_bert(attn_implementation="eager")
    student.config.output_attentions = True
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(len(calls)))
    trainer = TransferTrainer(
        student,
        arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            adam_epsilon=1e-2,
        ),
        data_collator=collate,
        train_dataset=text_rows(),
        objectives=[
            HiddenStateMatching(teacher, layers="last"),
            AttentionMatching(Teacher.of(teacher), weight=10.0, layers="last"),
        ],
        callbacks=[recorder := Recorder()],
    )
    trainer.train()
    return trainer, teacher, [recorder, calls]


def test_however_a_step_is_cut_the_gradient_is_the_same(tmp_path):
    whole, _, (expected, calls) = trained(tmp_path, batch=8, accumulate=1)
    assert len(calls) == 4  # micro-batches
    cut, _, (found, calls) = trained(tmp_path, batch=2, accumulate=4)
    assert len(calls) == 16
    assert expected.gradients.keys() == found.gradients.keys()
    for name in expected.gradients:
        if name.startswith("0/"):
            torch.testing.assert_close(found.gradients[name], expected.gradients[name], rtol=1e-4, atol=1e-6)
    assert whole.scaffold._state().keys() == cut.scaffold._state().keys()
    for name, weight in whole.scaffold._state().items():
        torch.testing.assert_close(cut.scaffold._state()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_run_trains_student_and_maps_and_leaves_the_teacher_alone(tmp_path):
    untouched = wide_bert().state_dict()
    trainer, teacher, _ = trained(tmp_path, batch=8, accumulate=1)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert set(trainer.scaffold._state()) == {f"0.projections.{depth}.weight" for depth in (1, 2, 3)}
    assert not {id(p) for p in teacher.parameters()} & {
        id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    first, last = (
        [entry["hidden_state_matching_loss"] for entry in trainer.state.log_history if "loss" in entry][end]
        for end in (0, -1)
    )
    assert last < first


def stages() -> transformers.PreTrainedModel:
    return make("swin", "ImageClassification")


REFUSED = {
    "distance": (lambda: HiddenStateMatching(tiny_bert(), distance="cosin"), "unknown distance 'cosin'. Did you mean"),
    "rule": (lambda: HiddenStateMatching(tiny_bert(), layers="lst").prepare(tiny_bert()), "Did you mean 'last'"),
    "depth": (lambda: HiddenStateMatching(tiny_bert(), layers={4: 1}).prepare(tiny_bert()), "0 .* to 3, found 4"),
    "embeddings have no attention": (
        lambda: AttentionMatching(tiny_bert(), layers={0: 1}).prepare(tiny_bert()), "from depth 1 up, found {0: 1}",
    ),
    "a map for two": (
        lambda: HiddenStateMatching(make("t5"), layers={1: 1}).prepare(make("t5")), "found an encoder and a decoder",
    ),
    "one line and two": (
        lambda: HiddenStateMatching(make("t5")).prepare(tiny_bert()),
        "BertForSequenceClassification and T5Model have no layers to match",
    ),
    "stages": (lambda: HiddenStateMatching(stages()).prepare(stages()), "SwinForImageClassification has stages"),
    "student without probabilities": (
        lambda: AttentionMatching(wide_bert()).prepare(tiny_bert(attn_implementation="sdpa")),
        "the student's attention is 'sdpa'.*attn_implementation=\"eager\"",
    ),
    "teacher without probabilities": (
        lambda: AttentionMatching(tiny_bert(attn_implementation="sdpa")).prepare(wide_bert()),
        "the teacher's attention is 'sdpa'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_matched_is_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_outputs_that_do_not_fit_are_refused():
    teacher, student = tiny_bert(), tiny_bert(seed=1)
    batch = collate(list(text_rows(4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    term = HiddenStateMatching(teacher)
    term.prepare(student)
    with pytest.raises(ConfigurationError, match="'hidden_states' of the student to be 4 tensors of 3 axes.* found 0"):
        term(student, batch, student(**inputs), 0.0)
    vision = make("vit", "ImageClassification")
    finer = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**FAMILIES["vit"].config.to_diff_dict(), "patch_size": 4})
    )
    term = HiddenStateMatching(finer)
    term.prepare(vision)
    pixels = random_inputs(vision, seed=0)
    with pytest.raises(ConfigurationError, match="Expected the same tokens"):
        term(vision, pixels, vision(**pixels, output_hidden_states=True), 0.0)
