"""One forward pass of a frozen model per micro-batch, for every objective that asks, and for no other batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import Objective
from hf_transfer.objectives.teacher import Teacher
from tests.tiny import collate, text_rows, tiny_bert, tiny_llama


class Asking(Objective):
    name = "asking"


class ReadingHiddenStates(Asking):
    hidden_states = True


class ReadingAttentions(Asking):
    attentions = True


def batch_of(count: int = 4, seed: int = 0):
    return collate(list(text_rows(count, seed=seed)))


def counted(model: nn.Module) -> list[dict]:
    """The keyword arguments of each forward pass to come."""
    calls: list[dict] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def served(model: nn.Module, *objectives: Objective) -> Teacher:
    teacher = Teacher.of(model)
    for objective in objectives:
        teacher.serve(objective, tiny_bert(seed=1))
    return teacher


def test_answers_as_the_model_does_in_evaluation_mode_without_gradients():
    model = tiny_bert(dropout=0.5).train()
    teacher = Teacher.of(model)
    model.train()  # as a trainer that found it would
    batch = batch_of()
    answer = teacher(batch)
    assert not model.training
    assert torch.equal(answer.logits, model(batch["input_ids"], batch["attention_mask"]).logits)
    assert not answer.logits.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_pass_for_all_and_then_the_answer_is_let_go():
    model = tiny_bert()
    objectives = [Asking(), ReadingHiddenStates(), Asking()]
    teacher = served(model, *objectives)
    calls = counted(model)
    batch = batch_of()
    answers = [teacher(batch), teacher(dict(batch)), teacher(batch)]
    assert len(calls) == 1
    assert answers[0] is answers[1] is answers[2]
    logits = weakref.ref(answers[0].logits)
    del answers
    gc.collect()
    assert logits() is None  # though the batch lives on
    teacher(batch)
    assert len(calls) == 2


def test_an_answer_is_never_given_for_another_batch():
    model = tiny_bert()
    objectives = [Asking(), Asking()]
    teacher = served(model, *objectives)
    for seed in range(20):  # the allocator soon gives one batch's addresses to the next
        batch = batch_of(seed=seed)
        expected = model(batch["input_ids"], batch["attention_mask"]).logits
        assert torch.equal(teacher(batch).logits, expected)
        del batch
    batch = batch_of()
    before = teacher(batch).logits
    batch["input_ids"][0, 0] += 1
    assert not torch.equal(teacher(batch).logits, before)
    teacher(batch)
    calls = counted(model)
    first = teacher(batch)
    assert teacher({**batch, "attention_mask": batch["attention_mask"].clone()}) is not first
    assert len(calls) == 2


def test_an_answer_goes_with_its_batch():
    objectives = [Asking(), Asking()]
    teacher = served(tiny_bert(), *objectives)
    batch = batch_of()
    logits = weakref.ref(teacher(batch).logits)
    gc.collect()
    assert logits() is not None
    del batch["input_ids"]
    gc.collect()
    assert logits() is None


def test_returns_what_its_objectives_read_as_long_as_they_live():
    model = tiny_bert(attn_implementation="eager")
    teacher = Teacher.of(model)
    assert teacher(batch_of()).hidden_states is None
    reading = [ReadingHiddenStates(), ReadingAttentions()]
    served(model, *reading)
    answer = teacher(batch_of())
    assert (len(answer.hidden_states), len(answer.attentions)) == (4, 3)
    reading.pop()
    assert teacher(batch_of()).attentions is None


def test_an_objective_that_joins_gets_what_it_reads_of_the_same_batch():
    model = tiny_bert()
    objectives = [Asking(), Asking(), ReadingHiddenStates()]
    teacher = served(model, *objectives[:2])
    batch = batch_of()
    assert teacher(batch).hidden_states is None
    served(model, objectives[2])
    assert teacher(batch).hidden_states is not None


def test_a_model_is_one_teacher_which_does_not_outlive_its_users():
    model = tiny_bert()
    teacher = Teacher.of(model)
    assert Teacher.of(model) is teacher
    assert Teacher.of(teacher) is teacher
    assert Teacher.of(tiny_bert()) is not teacher
    asking = Asking()
    served(model, asking)(batch_of())
    references = [weakref.ref(teacher), weakref.ref(model)]
    gc.disable()
    del teacher, model
    alive = [reference() for reference in references]
    gc.enable()
    assert alive == [None, None]


def test_reads_only_what_its_forward_method_names():
    torch.manual_seed(0)
    config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=60, max_position_embeddings=32)
    model = DistilBertForSequenceClassification(config)
    calls = counted(model)
    batch = batch_of()
    Teacher.of(model)({**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
    assert calls[0].keys() == {"input_ids", "attention_mask"}


def test_a_decoder_keeps_no_cache():
    assert Teacher.of(tiny_llama())(batch_of()).past_key_values is None


def test_sees_through_peft():
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    batch = batch_of()
    answer = Teacher.of(adapted)(batch)
    assert torch.equal(answer.logits, adapted(batch["input_ids"], batch["attention_mask"]).logits)


def test_runs_in_its_own_precision_whatever_the_student_does():
    torch.manual_seed(0)
    vision = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    for dtype in (torch.float32, torch.bfloat16):
        model = ViTForImageClassification(vision).to(dtype)
        batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.zeros(2, dtype=torch.long)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = Teacher.of(model)(batch)
        expected = model.eval()(pixel_values=batch["pixel_values"].to(dtype)).logits
        assert answer.logits.dtype == dtype
        assert torch.equal(answer.logits, expected)


SEQ2SEQ = {"d_model": 16, "vocab_size": 60, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
LABELS = torch.tensor([[5, 6, 7], [8, 2, -100]])


def test_an_encoder_decoder_reads_the_labels_shifted():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SEQ2SEQ, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    batch = {"input_ids": torch.randint(3, 60, (2, 5)), "labels": LABELS}
    answer = Teacher.of(model)(batch)
    assert answer.loss is None
    assert torch.equal(answer.logits, model(**batch).logits)


def test_whisper_shifts_the_labels_itself():
    torch.manual_seed(0)
    config = WhisperConfig(
        **SEQ2SEQ, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20, max_target_positions=20, num_mel_bins=8,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(2, 8, 40), "labels": LABELS}
    assert torch.equal(Teacher.of(model)(batch).logits, model(**batch).logits)


def test_another_device_gets_the_inputs_and_the_batch_gets_the_answers():
    if not torch.cuda.is_available():
        pytest.skip("needs a second device")
    model, batch = tiny_bert().cuda(), batch_of()
    asking = ReadingHiddenStates()
    answer = served(model, asking)(batch)
    assert {answer.logits.device, *(states.device for states in answer.hidden_states)} == {torch.device("cpu")}
    torch.testing.assert_close(answer.logits, model.cpu()(batch["input_ids"], batch["attention_mask"]).logits)


def test_what_cannot_teach_is_refused():
    with pytest.raises(ConfigurationError, match="expected a transformers model, found Linear"):
        Teacher.of(nn.Linear(2, 2))
    student = tiny_bert()
    with pytest.raises(ConfigurationError, match=r"asking: the student's 'bert\.emb.*' is the teacher's"):
        Teacher.of(student).serve(Asking(), student)
    sharded = tiny_bert()
    next(sharded.parameters()).ds_id = 0  # DeepSpeed's mark
    with pytest.raises(ConfigurationError, match="ZeRO-3 cut its weights into shards"):
        Teacher.of(sharded)
