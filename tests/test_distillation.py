"""Distillation: every head against the formula in float64, the fused loss against the plain one, refusals, figures."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_transfer.errors import ConfigurationError
from hf_transfer.linear_head import LinearHead
from hf_transfer.objectives import L2SP, Distillation, HiddenStateMatching
from hf_transfer.recipe import Recipe
from hf_transfer.schema import merge
from hf_transfer.training.distillation import DistillationTrainer
from hf_transfer.training.trainer import TransferTrainer
from tests.folders import write_classifier, write_decoder, write_encoder, write_rows, write_sentiment
from tests.objectives import TokenEntropy
from tests.tiny import VOCABULARY, arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 sum p log(p / q)`` over the last axis, in float64 and as the paper writes it."""
    q, p = ((logits.double() / temperature).softmax(-1) for logits in (student, teacher))
    return temperature**2 * (p * (p / q).log()).sum(-1)


def term(student, teacher, batch, *, temperature: float = 3.0, **options) -> torch.Tensor:
    objective = Distillation(teacher, temperature=temperature, **options)
    objective.prepare(student)
    outputs = student(**batch)
    return objective(student, batch, outputs, 0.0)


def pair(make):
    """Student and teacher with opinions: fresh heads are so nearly uniform that rounding would be all of a KL."""
    models = make(seed=0).eval(), make(seed=5).eval()
    for model in models:
        head = model.get_output_embeddings() or model.classifier
        with torch.no_grad():
            head.weight.mul_(50)
    return models


def seeded(cls, config, *, seed: int):
    torch.manual_seed(seed)
    return cls(config)


# ---- every head ----


def test_one_class_per_example_labelled_or_not():
    student, teacher = pair(tiny_bert)
    batch = {"input_ids": torch.randint(4, 60, (5, 7)), "labels": torch.tensor([0, 2, -100, 1, -100])}
    expected = kl(student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits, 3.0).mean()
    assert term(student, teacher, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_several_labels_per_example():
    student, teacher = pair(lambda seed: tiny_bert(seed=seed, problem_type="multi_label_classification"))
    batch = {"input_ids": torch.randint(4, 60, (5, 7)), "labels": torch.randint(0, 2, (5, 3)).float()}
    two_way = [torch.stack([model(batch["input_ids"]).logits, torch.zeros(5, 3)], -1) for model in (student, teacher)]
    assert term(student, teacher, batch).item() == pytest.approx(kl(*two_way, 3.0).mean().item(), rel=1e-4)


def test_a_number_per_example_whatever_the_temperature():
    student, teacher = pair(lambda seed: tiny_bert(seed=seed, num_labels=1))
    batch = {"input_ids": torch.randint(4, 60, (5, 7)), "labels": torch.randn(5)}
    expected = functional.mse_loss(student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits)
    for temperature in (1.0, 3.0):
        found = term(student, teacher, batch, temperature=temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_one_class_per_image():
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    student, teacher = pair(lambda seed: seeded(ViTForImageClassification, config, seed=seed))
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    expected = kl(student(batch["pixel_values"]).logits, teacher(batch["pixel_values"]).logits, 3.0).mean()
    assert term(student, teacher, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_one_class_per_token_and_nothing_where_there_is_no_label():
    config = BertConfig(num_labels=4, **SIZES)
    student, teacher = pair(lambda seed: seeded(BertForTokenClassification, config, seed=seed))
    labels = torch.tensor([[0, 1, -100, 3], [-100, 2, -100, -100]])
    batch = {"input_ids": torch.randint(4, 60, (2, 4)), "labels": labels}
    logits = [model(batch["input_ids"]).logits[labels != -100] for model in (student, teacher)]
    assert term(student, teacher, batch).item() == pytest.approx(kl(*logits, 3.0).mean().item(), rel=1e-4)


def causal_reference(student, teacher, batch, temperature: float) -> torch.Tensor:
    scored = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = [model(**inputs).logits[:, :-1][scored] for model in (student, teacher)]
    return kl(*logits, temperature).mean()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_next_token(divergence):
    student, teacher = pair(tiny_llama)
    batch = collate([language_rows(4)[row] for row in range(4)])
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    both = (student, teacher) if divergence == "forward_kl" else (teacher, student)
    expected = causal_reference(*both, batch, 3.0)
    assert term(student, teacher, batch, divergence=divergence).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_next_token_of_an_encoder_decoder():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    student, teacher = pair(lambda seed: seeded(T5ForConditionalGeneration, config, seed=seed))
    labels = torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100]])
    batch = {"input_ids": torch.randint(4, 60, (2, 6)), "labels": labels}
    logits = [model(**batch).logits[labels != -100] for model in (student, teacher)]
    assert term(student, teacher, batch).item() == pytest.approx(kl(*logits, 3.0).mean().item(), rel=1e-4)


def test_a_batch_without_labels_is_zero_and_not_a_nan():
    student, teacher = pair(tiny_llama)
    batch = {"input_ids": torch.randint(4, 60, (2, 4)), "labels": torch.full((2, 4), -100)}
    assert term(student, teacher, batch).item() == 0.0


def test_gradients_reach_the_student_alone():
    student, teacher = pair(tiny_bert)
    batch = {"input_ids": torch.randint(4, 60, (5, 7)), "labels": torch.tensor([0, 2, 1, 1, 0])}
    term(student, teacher, batch).backward()
    assert student.classifier.weight.grad.norm() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- labels and vocabularies ----


def with_labels(model, *names: str):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def test_labels_in_another_order_are_read_in_the_students(caplog):
    student, teacher = pair(tiny_bert)
    batch = {"input_ids": torch.randint(4, 60, (5, 7)), "labels": torch.tensor([0, 2, 1, 1, 0])}
    expected = kl(student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits[:, [2, 0, 1]], 3.0).mean()
    with caplog.at_level(logging.WARNING):
        found = term(with_labels(student, "c", "a", "b"), with_labels(teacher, "a", "b", "c"), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert "stand in another order" in caplog.text


def test_capital_letters_make_no_other_label(caplog):
    student, teacher = (with_labels(tiny_bert(num_labels=2), *names) for names in (("no", "yes"), ("NO", "YES")))
    with caplog.at_level(logging.WARNING):
        Distillation(teacher).prepare(student)
    assert not caplog.records


def test_a_longer_vocabulary_is_compared_where_both_mean_the_same():
    student, teacher = pair(tiny_llama)
    teacher.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    batch = {"input_ids": torch.randint(4, 60, (2, 6))}
    batch["labels"] = batch["input_ids"]
    logits = [model(batch["input_ids"]).logits[:, :-1, :50] for model in (student, teacher)]
    expected = kl(*logits, 3.0).mean()
    assert term(student, teacher, batch, vocabulary=50).item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(ConfigurationError, match=r"its vocabulary has 64 tokens, the student's 60.*shared_vocabulary"):
        term(student, teacher, batch)


def test_a_teacher_gets_the_columns_that_the_student_does_not_know(tmp_path):
    """Which of two texts a token is of: BERT reads it, DistilBERT does not."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3, dropout=0.0
    )
    student, teacher = pair(lambda seed: tiny_bert(seed=5) if seed else DistilBertForSequenceClassification(config))
    rows = text_rows(8).map(lambda row: {"token_type_ids": [0] + [1] * (len(row["input_ids"]) - 1)})
    settings = arguments(tmp_path, per_device_eval_batch_size=8)
    options = {"teacher": teacher, "train_dataset": rows, "eval_dataset": rows, "data_collator": collate}
    trainer = DistillationTrainer(student, settings, **options)
    batch = collate([rows[row] for row in range(8)])
    names = ("input_ids", "attention_mask", "token_type_ids")
    target = teacher(**{name: batch[name] for name in names}).logits
    expected = kl(student(**{name: batch[name] for name in names[:2]}).logits, target, 1.0).mean()
    assert trainer.evaluate()["eval_teacher_kl"] == pytest.approx(expected.item(), rel=1e-4)
    trainer.train()


def test_padding_that_only_the_student_knows_does_not_reach_the_teacher():
    teacher, student = tiny_llama(seed=5), tiny_llama()
    student.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, VOCABULARY, VOCABULARY]])
    batch = {"input_ids": ids, "attention_mask": ids.ne(VOCABULARY).long()}
    batch["labels"] = ids.masked_fill(ids == VOCABULARY, -100)
    found = term(student, teacher, batch, vocabulary=VOCABULARY)
    padded = batch | {"input_ids": ids.masked_fill(ids == VOCABULARY, 0)}
    assert found.item() == pytest.approx(term(student, teacher, padded, vocabulary=VOCABULARY).item(), rel=1e-5)
    batch["attention_mask"][:] = 1
    with pytest.raises(ConfigurationError, match="holds the token 60, but the teacher has 60 tokens only"):
        term(student, teacher, batch, vocabulary=VOCABULARY)


def test_a_prompt_tuned_student_is_compared_where_the_text_is():
    student, teacher = pair(tiny_llama)
    student = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = {"input_ids": torch.randint(4, 60, (2, 6))}
    batch |= {"labels": batch["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    logits = student(**batch).logits[:, -6:-1], teacher(batch["input_ids"]).logits[:, :-1]
    expected = kl(*(each.flatten(0, 1) for each in logits), 3.0).mean()
    assert term(student, teacher, batch).item() == pytest.approx(expected.item(), rel=1e-4)


REFUSED = {
    "another problem": (
        lambda: Distillation(tiny_bert(problem_type="multi_label_classification")).prepare(
            tiny_bert(problem_type="single_label_classification")
        ),
        "its problem_type is 'multi_label_classification', the student's 'single_label_classification'",
    ),
    "temperature": (lambda: Distillation(tiny_bert(), temperature=0), "temperature is 0"),
    "divergence": (lambda: Distillation(tiny_bert(), divergence="forward_lk"), "Did you mean 'forward_kl'"),
    "no model": (lambda: Distillation(torch.nn.Linear(2, 2)), "expected a transformers model"),
    "another task": (
        lambda: Distillation(tiny_llama()).prepare(tiny_bert()),
        r"LlamaForCausalLM \(causal language model\) cannot teach BertForSequenceClassification \(classification\)",
    ),
    "another number of labels": (
        lambda: Distillation(tiny_bert(num_labels=4)).prepare(tiny_bert()),
        r"its 4 labels are 'label_3'.*expected the student's 3",
    ),
    "other labels": (
        lambda: Distillation(with_labels(tiny_bert(), "a", "b", "x")).prepare(with_labels(tiny_bert(), "a", "b", "c")),
        r"its 3 labels are 'x'.*expected the student's 3: 'c'",
    ),
    "alpha": (lambda: DistillationTrainer(tiny_bert(), teacher=tiny_bert(), alpha=1.5), "alpha = 1.5"),
    "both weights": (
        lambda: DistillationTrainer(tiny_bert(), teacher=tiny_bert(), task_weight=1.0),
        "task_weight is 1 - alpha",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        make()


# ---- the fused loss ----


def trained(model, folder, cls=TransferTrainer, **options):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer = cls(
        model,
        arguments(folder, **settings, **options.pop("arguments", {})),
        train_dataset=language_rows(16),
        data_collator=collate,
        **options,
    )
    trainer.train()
    weights = {name: value.detach() for name, value in trainer.model.named_parameters()}
    return trainer, weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(one, other, *, rel: float = 2e-5):
    (_, weights, logs), (_, other_weights, other_logs) = one, other
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=rel, msg=name)
    assert len(logs) == len(other_logs) > 2
    for entry, again in zip(logs, other_logs, strict=True):
        for key in (key for key in entry if key.endswith("loss") and key in again):
            assert entry[key] == pytest.approx(again[key], rel=1e-4), key


def gpt2(seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


ADAM = {"arguments": {"adam_epsilon": 1e-2}}  # where a gradient is nearly zero, Adam alone would double the rounding


@pytest.mark.parametrize("make", [tiny_llama, gpt2], ids=["untied", "tied"])
def test_a_fused_loss_trains_as_plain_trainer_does(make, tmp_path):
    fused = trained(make(), tmp_path, fused_loss=True, **ADAM)
    assert fused[0]._head is not None
    assert_same_training(fused, trained(make(), tmp_path, fused_loss=False, **ADAM))
    if make is tiny_llama:
        assert_same_training(fused, trained(make(), tmp_path, cls=Trainer, **ADAM))


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_a_fused_distillation_trains_as_the_plain_one_does(divergence, tmp_path):
    def run(fused: bool):
        teacher = tiny_llama(seed=5, layers=2)
        options = {"teacher": teacher, "alpha": 0.7, "divergence": divergence}
        return trained(
            tiny_llama(),
            tmp_path,
            cls=DistillationTrainer,
            objectives=[L2SP(weight=0.1), HiddenStateMatching(teacher, weight=0.2)],
            fused_loss=fused,
            **options,
            **ADAM,
        )

    fused, plain = run(True), run(False)
    assert fused[0]._head is not None
    assert plain[0]._head is None
    assert_same_training(fused, plain)
    weights = {"task": 0.3, "distillation": 0.7, "l2sp": 0.1, "hidden_state_matching": 0.2}
    total = sum(weight * fused[2][0][f"{name}_loss"] for name, weight in weights.items())
    assert fused[2][0]["loss"] == pytest.approx(total, rel=1e-4)


def test_a_fused_distillation_into_an_adapter(tmp_path):
    def run(fused: bool):
        torch.manual_seed(3)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        student = get_peft_model(tiny_llama(), config)
        teacher = tiny_llama(seed=5)
        return trained(student, tmp_path, cls=DistillationTrainer, teacher=teacher, fused_loss=fused, **ADAM)

    assert_same_training(run(True), run(False))


def test_the_logits_are_not_there_while_training_and_are_there_again_after(tmp_path):
    seen = []

    class Watching(TransferTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append(outputs.logits.shape[-1])
            return loss

    trainer, _, _ = trained(tiny_llama(), tmp_path, cls=Watching, fused_loss=True)
    assert set(seen) == {16}, "the width of the hidden states, not of the vocabulary"
    assert trainer.model(torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY)


def capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, pad_token_id=0))


def adapted_head():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (capped, "Gemma2ForCausalLM does more to its logits"),
        (adapted_head, "no plain linear head"),
        (tiny_bert, "BertForSequenceClassification has no plain linear head"),
    ],
    ids=["capped logits", "adapter on the head", "classifier"],
)
def test_what_cannot_be_fused_is_said(make, reason, tmp_path, caplog):
    with pytest.raises(ConfigurationError, match=reason):
        LinearHead(make())
    with caplog.at_level(logging.WARNING):
        trainer = TransferTrainer(make(), arguments(tmp_path), train_dataset=language_rows(4), fused_loss=True)
    assert trainer._head is None
    assert "fused_loss is off" in caplog.text
    assert reason in caplog.text


def test_another_reader_of_the_logits_keeps_them(tmp_path, caplog):
    objectives = [TokenEntropy(weight=0.1)]
    with caplog.at_level(logging.WARNING):
        trainer, _, logs = trained(tiny_llama(), tmp_path, fused_loss=True, objectives=objectives)
    assert trainer._head is None
    assert "token_entropy needs the logits" in caplog.text
    assert "token_entropy_loss" in logs[0]


# ---- the trainer ----


def test_evaluation_reports_the_tasks_loss_and_how_near_the_teacher_is(tmp_path):
    student, teacher = pair(tiny_bert)
    rows = text_rows(10)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=4),
        teacher=teacher,
        eval_dataset=rows,
        data_collator=collate,
    )
    found = trainer.evaluate()
    batch = collate([rows[row] for row in range(10)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, target = student(**inputs).logits, teacher(**inputs).logits
    agreement = (logits.argmax(-1) == target.argmax(-1)).float().mean().item()
    assert found["eval_teacher_agreement"] == pytest.approx(agreement)
    assert found["eval_teacher_kl"] == pytest.approx(kl(logits, target, 1.0).mean().item(), rel=1e-4)
    plain = Trainer(student, trainer.args, eval_dataset=rows, data_collator=collate).evaluate()
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_evaluation_of_a_language_model_counts_tokens(tmp_path):
    student, teacher = pair(tiny_llama)
    rows = language_rows(5)
    options = {"teacher": teacher, "eval_dataset": rows, "data_collator": collate}
    settings = arguments(tmp_path, per_device_eval_batch_size=2)
    found = DistillationTrainer(student, settings, **options).evaluate()
    batch = collate([rows[row] for row in range(5)])
    expected = causal_reference(student, teacher, batch, 1.0)
    assert found["eval_teacher_kl"] == pytest.approx(expected.item(), rel=1e-4)
    assert (
        "eval_teacher_kl" not in DistillationTrainer(student, settings, compare_to_teacher=False, **options).evaluate()
    )


def test_a_step_without_any_label_learns_from_the_teacher_alone(tmp_path):
    rows = text_rows(8).map(lambda row: {"labels": -100})
    student, teacher = tiny_bert(), tiny_bert(seed=5)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, train_dataset=rows, data_collator=collate
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["task_loss"] == 0.0
    assert entry["loss"] == pytest.approx(0.5 * entry["distillation_loss"], rel=1e-4)
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_a_student_comes_to_agree_with_its_teacher(tmp_path):
    teacher = tiny_bert(seed=5)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    rows = text_rows(64)
    trainer = DistillationTrainer(
        tiny_bert(layers=1),
        arguments(tmp_path, num_train_epochs=20, logging_steps=100),
        teacher=teacher,
        alpha=1.0,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_teacher_kl"] < 0.3 * before["eval_teacher_kl"]
    assert after["eval_teacher_agreement"] > before["eval_teacher_agreement"]


# ---- the recipe ----


@pytest.fixture
def values(tmp_path):
    return {
        "recipe": "distillation",
        "model": {"name": str(write_encoder(tmp_path / "student", layers=1))},
        "teacher": {"name": str(write_classifier(tmp_path / "teacher", seed=5))},
        "data": {"path": "json", "data_files": write_sentiment(tmp_path / "data")},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
    }


def test_a_recipe_distils_one_folder_into_another(values, tmp_path):
    recipe = Recipe.from_values({**values, "alpha": 0.8, "temperature": 4, "unfreeze": {"until": 0.5}})
    assert Recipe.from_values(recipe.values()) == recipe
    before = load_file(tmp_path / "teacher" / "model.safetensors")
    result = recipe.run()
    assert {"teacher_agreement", "teacher_kl", "accuracy"} <= result.metrics["test"].keys()
    log = (result.folder / "log_history.json").read_text()
    assert "distillation_loss" in log
    assert "task_loss" in log
    assert all(
        torch.equal(value, before[name])
        for name, value in load_file(tmp_path / "teacher" / "model.safetensors").items()
    )
    assert len(load_file(result.folder / "model.safetensors")) < len(before), "the student, one block of three"


RECIPES_REFUSED = {
    "alpha": ({"alpha": -0.1}, "alpha = -0.1"),
    "temperature": ({"temperature": 0}, "temperature is 0"),
    "task weight": ({"task_weight": 0.5}, "task_weight is 1 - alpha"),
    "divergence": ({"divergence": "kl"}, "divergence = 'kl'"),
    "a teacher that is cut": ({"teacher": {"name": "any", "layers": 2}}, "teacher.layers"),
    "another divergence from a store": (
        {"divergence": "reverse_kl", "store": {"directory": "any"}},
        "a store serves forward_kl only",
    ),
    "hidden states from a store": (
        {"objectives": {"hidden_state_matching": {}}, "store": {"directory": "any"}},
        "it asks the teacher itself",
    ),
    "hidden states without a teacher": (
        {"recipe": "lora", "objectives": {"hidden_state_matching": {}}},
        "it needs a teacher, which the recipe 'lora' has not",
    ),
    "layers under an adapter": (
        {"model": {"name": "any", "layers": 2}, "adapter": {"method": "lora"}},
        "model.layers = 2 changes the base",
    ),
    "no teacher": ({"teacher": {"name": "nowhere/at-all"}}, "teacher.name = 'nowhere/at-all'"),
}


@pytest.mark.parametrize("case", RECIPES_REFUSED)
def test_a_recipe_is_refused(case, values):
    changes, message = RECIPES_REFUSED[case]
    if changes.get("recipe"):
        del values["teacher"]
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_values({**values, **changes}).build()


def test_a_teacher_with_another_vocabulary_is_refused_before_a_model_is_loaded(values, tmp_path):
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"goods"'))
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"id 5: student 'good', teacher 'goods'"):
        Recipe.from_values(values).build()


def test_a_teacher_without_a_head_is_refused(values, tmp_path):
    values["teacher"] = {"name": str(write_encoder(tmp_path / "headless"))}
    with pytest.raises(ConfigurationError, match="BertModel"):
        Recipe.from_values(values).build()


def test_a_student_of_the_teachers_own_blocks_learns_its_hidden_states_too(values, tmp_path):
    matching = {"hidden_state_matching": {"weight": 0.5, "layers": "last"}}
    values |= {"model": {"name": values["teacher"]["name"], "layers": [1, 3]}, "objectives": matching}
    recipe = Recipe.from_values(values)
    assert Recipe.from_values(recipe.values()) == recipe
    student = recipe.build().model
    teacher = load_file(tmp_path / "teacher" / "model.safetensors")
    assert student.config.num_hidden_layers == 2
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(student.state_dict()[name.format(1)], teacher[name.format(2)])
    assert torch.equal(student.classifier.weight, teacher["classifier.weight"])
    result = recipe.run()
    assert "hidden_state_matching_loss" in (result.folder / "log_history.json").read_text()


@pytest.mark.parametrize("form", ["top_k", "samples"])
def test_a_recipe_trains_from_what_its_teacher_was_asked_before(form, values, tmp_path):
    values["store"] = {"directory": str(tmp_path / "store"), "form": form}
    recipe = Recipe.from_values(values)
    assert Recipe.from_values(recipe.values()) == recipe
    with pytest.raises(ConfigurationError, match="holds no teacher's store"):
        recipe.run()
    store = recipe.teach()
    assert len(store) == 32
    (tmp_path / "teacher" / "model.safetensors").unlink()
    result = recipe.run()
    assert "distillation_loss" in (result.folder / "log_history.json").read_text()
    assert "teacher_agreement" not in result.metrics["test"]


def test_a_recipe_learns_from_its_teacher_where_there_are_no_labels(values, tmp_path):
    rows = [{"text": f"the book was word{index}"} for index in range(12)]
    values["data"]["data_files"]["more"] = str(write_rows(tmp_path / "more.jsonl", rows))
    values["data"]["unlabelled"] = "more"
    recipe = Recipe.from_values(values)
    trainer = recipe.build()
    assert len(trainer.train_dataset) == 32 + 12
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    del values["teacher"]
    with pytest.raises(ConfigurationError, match="the recipe 'fine_tune' learns from labels alone"):
        Recipe.from_values(values | {"recipe": "fine_tune"})


@pytest.mark.parametrize("changes", [{"store": {"k": 3}}, {"teacher": {"name": "another/teacher"}}], ids=["k", "name"])
def test_a_store_of_another_teacher_or_other_settings_is_refused(changes, values, tmp_path):
    values["store"] = {"directory": str(tmp_path / "store")}
    Recipe.from_values(values).teach()
    with pytest.raises(ConfigurationError, match="was built from something else"):
        Recipe.from_values(merge(values, changes)).build()


def test_a_store_of_other_data_is_refused_before_the_student_is_loaded(values, tmp_path):
    values["store"] = {"directory": str(tmp_path / "store")}
    Recipe.from_values(values).teach()
    (tmp_path / "student" / "model.safetensors").unlink()
    values["data"]["train_size"] = 16
    with pytest.raises(ConfigurationError, match="found 16 examples, but the teacher's store .* is of 32"):
        Recipe.from_values(values).build()


def test_a_decoder_is_distilled_from_its_name(tmp_path):
    folder = write_decoder(tmp_path / "teacher")
    trainer = DistillationTrainer(tiny_llama(layers=1), arguments(tmp_path / "run"), teacher=str(folder))
    assert trainer.distillation.teacher.core.config.num_hidden_layers == 3
    assert trainer._head is not None
    assert SimpleNamespace(**vars(trainer.distillation.teacher)).core.training is False
