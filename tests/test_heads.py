"""A fitted head is the optimum inside an ordinary model; the added block takes the mean of the real tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from hf_transfer.errors import ConfigurationError
from hf_transfer.heads import add_mean_pooling, fit_head
from tests.test_cuts import FAMILIES, TEXT, batch_of, inputs

MEAN_POOLED = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra"]


def make(family: str, task: str = "ForSequenceClassification", **settings) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TEXT, **settings)
    return getattr(transformers, f"{family}{task}")(config).eval()


def normalised_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over real tokens of the last hidden states, to zero mean and unit variance."""
    states, mask = model.base_model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return functional.layer_norm((states * mask).sum(1) / mask.sum(1), states.shape[-1:])


@pytest.mark.parametrize("family", MEAN_POOLED)
def test_the_first_position_becomes_the_mean(family):
    model, batch = make(family), inputs(batch_of("text"))
    with torch.no_grad():
        expected = normalised_mean(model, batch)
        assert add_mean_pooling(model) is model
        outputs = model.base_model(**batch)
    torch.testing.assert_close(outputs.last_hidden_state[:, 0], expected, atol=0.01, rtol=0.01)
    if outputs.get("pooler_output") is not None:
        torch.testing.assert_close(outputs.pooler_output, torch.tanh(0.1 * expected), atol=1e-3, rtol=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_mean_in_low_precision(dtype, tolerance):
    model, batch = make("Bert"), inputs(batch_of("text"))
    with torch.no_grad():
        expected = normalised_mean(model, batch)
        found = add_mean_pooling(model.to(dtype)).base_model(**batch).last_hidden_state[:, 0]
    assert found.dtype == dtype
    assert (found - expected).norm() < tolerance * expected.norm()


def test_it_is_an_ordinary_model(tmp_path):
    model, batch = add_mean_pooling(make("Bert")), inputs(batch_of("text"))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is transformers.BertForSequenceClassification
    assert again.config.num_hidden_layers == 4
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


def test_the_block_goes_on_taking_a_mean_in_training():
    model, batch = add_mean_pooling(make("Bert")).train(), batch_of("text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    block = model.bert.encoder.layer[-1]
    attention = block.attention.self
    for frozen in (attention.query, attention.key, block.intermediate.dense):
        assert not frozen.weight.any()
    assert not block.output.dense.weight.any()
    assert model.bert.encoder.layer[0].output.dense.weight.grad is None
    assert not torch.equal(attention.value.weight, torch.eye(16))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [("MPNet", {}, "'mpnet'"), ("DistilBert", {}, "'distilbert'"), ("Bert", {"is_decoder": True}, "a decoder")],
)
def test_other_families_get_no_mean_pooling(family, settings, message):
    task = "ForSequenceClassification" if not settings else "LMHeadModel"
    config = {} if family == "DistilBert" else TEXT
    model = getattr(transformers, f"{family}{task}")(getattr(transformers, f"{family}Config")(**config, **settings))
    before = model.config.num_hidden_layers
    with pytest.raises(ConfigurationError, match=f"found {message}"):
        add_mean_pooling(model)
    assert model.config.num_hidden_layers == before


def problem(outputs: int, *, examples: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and noisy scores that are linear in them."""
    generator = torch.Generator().manual_seed(seed)
    features = 7 * torch.randn(examples, 16, generator=generator) + 3
    truth = torch.randn(outputs, 16, generator=torch.Generator().manual_seed(5))
    return features, features @ truth.T / 10 + 0.3 * torch.randn(examples, outputs, generator=generator)


def model_for(outputs: int, *, family: str = "bert", **config) -> nn.Module:
    torch.manual_seed(0)
    made = FAMILIES[family]
    settings = getattr(transformers, made.config)(**made.settings, num_labels=outputs, **config)
    return getattr(transformers, made.model)(settings)


def penalised(loss, logits, labels, weight, scale, strength):
    """What scikit-learn minimises: the loss's sum and half the squared norm of the weights on features of norm 1.

    With two classes, those are the weights of the difference of their scores.
    """
    if loss is functional.cross_entropy and len(weight) == 2:
        weight = weight[1] - weight[0]
    return loss(logits, labels) * len(labels) + (weight * scale).square().sum() / (2 * strength)


CASES = {
    "binary": (2, lambda scores: scores.argmax(1), functional.cross_entropy),
    "classes": (4, lambda scores: scores.argmax(1), functional.cross_entropy),
    "labels": (
        3,
        lambda scores: (scores > 0).float(),
        lambda x, y: 3 * functional.binary_cross_entropy_with_logits(x, y),
    ),
    "number": (1, lambda scores: scores[:, 0], lambda x, y: functional.mse_loss(x[:, 0], y) / 2),
    "numbers": (2, lambda scores: scores, functional.mse_loss),
}


@pytest.mark.parametrize("strength", [0.1, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_a_fitted_head_is_the_optimum(case, strength):
    """The gradient of the penalised loss vanishes there, for weights and bias."""
    outputs, label, loss = CASES[case]
    kind = {"problem_type": "regression"} if case == "numbers" else {}
    features, scores = problem(outputs)
    labels = label(scores)
    model = model_for(outputs, **kind)
    fit = fit_head(model, features, labels, strengths=[strength])
    assert fit.C == strength

    scale = features.square().sum(1).mean().sqrt()
    head = model.classifier
    value = penalised(loss, head(features), labels, head.weight, scale, strength)
    gradients = torch.autograd.grad(value, [head.weight, head.bias])
    assert gradients[0].norm() / scale < 0.02
    assert gradients[1].norm() < 0.02


@pytest.mark.parametrize("outputs", [2, 4])
def test_a_head_without_bias_gets_none(outputs):
    features, scores = problem(outputs)
    model = model_for(outputs, family="llama")
    fit_head(model, features, scores.argmax(1), strengths=[1.0])
    scale = features.square().sum(1).mean().sqrt()
    weight = model.score.weight
    value = penalised(functional.cross_entropy, features @ weight.T, scores.argmax(1), weight, scale, 1.0)
    assert torch.autograd.grad(value, weight)[0].norm() / scale < 0.02


def test_regularisation_is_chosen_by_the_loss_on_validation_data():
    features, scores = problem(3, examples=40)
    held_out, held_out_scores = problem(3, examples=500, seed=1)
    labels, validation = scores.argmax(1), (held_out, held_out_scores.argmax(1))
    strengths = [0.001, 1.0, 1000.0, 1e6]
    losses = {}
    for strength in strengths:
        model = model_for(3)
        fit = fit_head(model, features, labels, validation=validation, strengths=[strength])
        losses[strength] = functional.cross_entropy(model.classifier(held_out), validation[1]).item()
        assert fit.validation_loss == pytest.approx(losses[strength], abs=1e-4)
    best = min(losses, key=losses.get)
    assert best not in (strengths[0], strengths[-1])
    assert fit_head(model_for(3), features, labels, validation=validation, strengths=strengths).C == best
    assert fit_head(model_for(3), features, labels, strengths=strengths).C == best


def test_a_class_without_examples_never_wins():
    features, scores = problem(4)
    seen = scores[:, [0, 2]].argmax(1) * 2
    model = model_for(4)
    fit_head(model, features, seen)
    assert set(model.classifier(features).argmax(1).tolist()) == {0, 2}


def test_a_label_that_all_examples_share_is_not_predicted_by_half():
    features, scores = problem(2)
    labels = torch.stack([torch.zeros(60), (scores[:, 1] > 0).float()], dim=1)
    model = model_for(2)
    fit_head(model, features, labels)
    chance = model.classifier(features).sigmoid()[:, 0]
    torch.testing.assert_close(chance, torch.full_like(chance, 1 / 62))


def test_labels_may_be_a_list():
    features, scores = problem(2)
    fitted = [model_for(2), model_for(2)]
    for model, labels in zip(fitted, (scores.argmax(1), scores.argmax(1).tolist()), strict=True):
        fit_head(model, features, labels)
    assert torch.equal(fitted[0].classifier.weight, fitted[1].classifier.weight)


def test_the_fitted_model_is_saved_as_an_ordinary_one(tmp_path):
    features, scores = problem(3)
    model, batch = model_for(3).eval(), inputs(batch_of("text"))
    fit_head(model, features, scores.argmax(1))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta"])
def test_a_head_of_several_layers_is_refused(family):
    features, scores = problem(2)
    with pytest.raises(ConfigurationError, match="expected one linear layer.*PrefixCache"):
        fit_head(FAMILIES[family].make(), features, scores.argmax(1))


def test_a_bare_model_and_a_wrapped_head_are_refused():
    features, scores = problem(2)
    wrapped = get_peft_model(FAMILIES["bert"].make(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    for model in (FAMILIES["bert"].make().bert, wrapped):
        with pytest.raises(ConfigurationError, match="expected one linear layer"):
            fit_head(model, features, scores.argmax(1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2] * 20), r"classes \[0, 1, 2\], expected two or more of 0 to 1"),
        (torch.tensor([0, 1, -100] * 20), "expected two or more of 0 to 1"),
        (torch.ones(60, dtype=torch.long), r"classes \[1\], expected two or more"),
        (torch.ones(59, dtype=torch.long), r"found shape \(59,\), expected \(60,\)"),
        (torch.ones(60), r"found shape \(60,\), expected \(60, 2\) \(multi_label_classification\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ConfigurationError, match=message):
        fit_head(model_for(2), problem(2)[0], labels)
