"""Adaptation terms against the papers' formulas, two separate passes, and what theory says is zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BertForMultipleChoice, BertForQuestionAnswering

from hf_transfer.adversarial import certainty_weight, multilinear_map, reverse_gradient
from hf_transfer.data.domains import DomainCollator, DomainPairs, DomainStream
from hf_transfer.discrepancy import coral, mmd
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import CORAL, L2SP, MMD, ConditionalAdversarial, Distillation, DomainAdversarial, JointMMD
from hf_transfer.schedules import GradualUnfreeze, TopLevels
from hf_transfer.training.domains import DomainAdversarialTrainer, DomainAlignmentTrainer
from hf_transfer.training.trainer import TransferTrainer
from tests.tiny import arguments, collate, language_rows, text_rows, tiny_bert, tiny_llama


def rows(count: int, seed: int, **options):
    return text_rows(count, seed=seed, **options).remove_columns("domain")


def pairs(source: int = 16, target: int = 12) -> DomainPairs:
    return DomainPairs(rows(source, 0), rows(target, 1))


def batch_of(count: int = 8) -> dict:
    data = pairs()
    return dict(DomainCollator(collate)([data[index] for index in range(count)]))


def asked(objective, model, batch, *, progress=0.5):
    """The term on one batch, and the model's features."""
    torch.manual_seed(0)
    model.train()
    objective.prepare(model)
    inputs = {name: value for name, value in batch.items() if name != "domain"}
    outputs = model(**inputs)
    return objective(model, batch, outputs, progress), model.bert(**{k: v for k, v in inputs.items() if k != "labels"})


class TestFormulas:
    def test_a_reversed_gradient(self):
        x = torch.tensor([1.0, -2.0], requires_grad=True)
        y = reverse_gradient(x, 0.3)
        assert torch.equal(y, x)
        (y * torch.tensor([2.0, 5.0])).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([-0.6, -1.5]))

    def test_the_random_map_keeps_inner_products_in_expectation(self):
        torch.manual_seed(0)
        f, g = torch.randn(4, 6), torch.randn(4, 3).softmax(-1)
        exact = multilinear_map(f, g)
        torch.testing.assert_close(
            exact, torch.stack([torch.outer(b, a).flatten() for a, b in zip(f, g, strict=True)])
        )
        mapped = multilinear_map(f, g, (torch.randn(6, 200_000), torch.randn(3, 200_000)))
        torch.testing.assert_close(mapped @ mapped.t(), exact @ exact.t(), rtol=0.05, atol=0.05)

    def test_certainty(self):
        weights = certainty_weight(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        torch.testing.assert_close(weights, torch.tensor([2.0, 1.5]))


class TestAdversarial:
    def test_the_gradient_is_that_of_two_passes(self):
        """Source and target apart, each through model and critic, the task on the source alone: DANN as it is
        written in the paper, eq. 9 and 10."""
        strength, batch = 0.7, batch_of()
        model, critic = tiny_bert(), DomainAdversarial(strength=strength, hidden_size=8)
        naive = copy.deepcopy(model)
        term, _ = asked(critic, model, batch)
        inputs = {name: value for name, value in batch.items() if name != "domain"}
        (model(**inputs).loss + term).backward()

        domain_losses = []
        for domain in (0, 1):
            part = {name: value[batch["domain"] == domain] for name, value in inputs.items()}
            labels = part.pop("labels")
            outputs = naive.bert(**part)
            if domain == 0:
                functional.cross_entropy(naive.classifier(outputs.pooler_output), labels).backward(retain_graph=True)
            guess = critic.critic(outputs.pooler_output)
            domain_losses.append(functional.cross_entropy(guess, torch.full((len(guess),), domain)))
        reversed_gradients = torch.autograd.grad(sum(domain_losses) / 2, list(naive.bert.parameters()))
        for (name, ours), theirs in zip(model.bert.named_parameters(), reversed_gradients, strict=True):
            task = dict(naive.bert.named_parameters())[name].grad
            expected = (0 if task is None else task) - strength * theirs
            torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-7)
        assert term.item() == pytest.approx((sum(domain_losses) / 2).item(), rel=1e-5)
        assert next(critic.critic.parameters()).grad is not None

    def test_the_strength_follows_the_papers_ramp(self):
        batch = batch_of()
        gradients = {}
        for progress in (0.0, 0.1, 1.0):
            model, critic = tiny_bert(), DomainAdversarial(hidden_size=8)
            term, _ = asked(critic, model, batch, progress=progress)
            term.backward()
            gradients[progress] = model.bert.pooler.dense.weight.grad
            assert critic.critic[0].weight.grad.abs().max() > 0
        assert not gradients[0.0].any()
        ratio = (gradients[0.1].norm() / gradients[1.0].norm()).item()
        ramp = [2 / (1 + math.exp(-10 * progress)) - 1 for progress in (0.1, 1.0)]
        assert ratio == pytest.approx(ramp[0] / ramp[1], rel=1e-4)

    def test_conditional_on_predictions_that_are_not_trained(self):
        batch, model = batch_of(), tiny_bert()
        critic = ConditionalAdversarial(strength=1.0, hidden_size=8)
        term, outputs = asked(critic, model, batch)
        features, g = outputs.pooler_output, model.classifier(outputs.pooler_output).softmax(-1)
        joint = torch.einsum("nc,nd->ncd", g, features).flatten(1)
        weight = 1 + torch.exp((g * g.log()).sum(-1))
        losses = functional.cross_entropy(critic.critic(joint), batch["domain"], reduction="none")
        torch.testing.assert_close(term, (weight * losses).mean())
        term.backward()
        assert model.classifier.weight.grad is None
        assert model.bert.pooler.dense.weight.grad.any()

    def test_a_large_map_is_random_and_kept(self, monkeypatch):
        monkeypatch.setattr("hf_transfer.objectives.domains.LARGEST_MAP", 40)
        critic = ConditionalAdversarial(hidden_size=8, map_size=32)
        term, _ = asked(critic, tiny_bert(), batch_of())
        assert critic.critic[0].in_features == 32
        assert {"of_features", "of_predictions"} <= critic.state_dict().keys()
        assert torch.isfinite(term)

    def test_spectral_norm_bounds_every_layer(self):
        critic = DomainAdversarial(hidden_size=8, spectral_norm=True)
        asked(critic, tiny_bert(), batch_of())
        for _ in range(50):
            critic.critic(torch.randn(4, 16))
        slopes = [torch.linalg.matrix_norm(each.weight, 2) for each in critic.critic if isinstance(each, nn.Linear)]
        assert len(slopes) == 3
        assert max(slopes) < 1.01


class TestDiscrepancies:
    @pytest.mark.parametrize(
        ("objective", "expected"),
        [
            (MMD(), lambda s, t, p, q: mmd(s, t)),
            (MMD(estimator="unbiased", bandwidth=3.0), lambda s, t, p, q: mmd(s, t, bandwidth=3.0, unbiased=True)),
            (CORAL(), lambda s, t, p, q: coral(s, t)),
            (JointMMD(), lambda s, t, p, q: mmd([s, p], [t, q])),
        ],
    )
    def test_of_the_domains_features(self, objective, expected):
        batch, model = batch_of(), tiny_bert()
        term, outputs = asked(objective, model, batch)
        features, source = outputs.pooler_output, batch["domain"] == 0
        predictions = model.classifier(features).softmax(-1)
        torch.testing.assert_close(
            term, expected(features[source], features[~source], predictions[source], predictions[~source])
        )
        term.backward()
        assert model.bert.encoder.layer[0].output.dense.weight.grad.any()

    def test_several_places_are_added_up(self):
        batch, model = batch_of(), tiny_bert()
        both, _ = asked(MMD(pooling=["mean", "cls"]), model, batch)
        each = [asked(MMD(pooling=place), model, batch)[0] for place in ("mean", "cls")]
        torch.testing.assert_close(both, sum(each))

    def test_zero_where_the_domains_are_the_same(self):
        rows_twice = rows(8, 0)
        data = DomainPairs(rows_twice, rows_twice)
        batch = dict(DomainCollator(collate)([data[index] for index in range(8)]))
        for objective in (MMD(), CORAL(), JointMMD(), MMD(estimator="random_features", features=64)):
            assert asked(objective, tiny_bert(), batch)[0].item() == pytest.approx(0, abs=1e-6)

    def test_several_sources_each_meet_the_target(self):
        data = DomainPairs([rows(8, 0), rows(8, 2)], rows(8, 1))
        batch = dict(DomainCollator(collate)([data[index] for index in range(8)]))
        term, outputs = asked(MMD(domains=3), tiny_bert(), batch)
        parts = [outputs.pooler_output[batch["domain"] == domain] for domain in range(3)]
        torch.testing.assert_close(term, (mmd(parts[0], parts[2]) + mmd(parts[1], parts[2])) / 2)


def run(folder, trainer=DomainAdversarialTrainer, *, data=None, model=None, changes=None, **options):
    made = trainer(
        model or tiny_bert(),
        arguments(folder, **(changes or {})),
        train_dataset=data or pairs(),
        data_collator=collate,
        **options,
    )
    made.train()
    return made


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


class TestTraining:
    def test_target_labels_change_nothing(self, tmp_path):
        source, target = rows(16, 0), rows(16, 1)
        poisoned = target.map(lambda row: {"labels": 999})
        runs = [run(tmp_path, data=DomainPairs(source, each)) for each in (target, poisoned)]
        for (name, one), other in zip(weights(runs[0]).items(), weights(runs[1]).values(), strict=True):
            assert torch.equal(one, other), name

    def test_columns_that_no_model_reads_are_left_out(self, tmp_path):
        source, target = (each.add_column("text", ["x"] * 16) for each in (rows(16, 0), rows(16, 1)))
        assert run(tmp_path, data=DomainPairs(source, target)).state.global_step == 2

    def test_with_no_weight_it_is_training_on_the_source(self, tmp_path):
        """The same seed orders 16 pairs as 16 examples; padding is the same, for every row is as long."""
        source, target = (
            each.map(lambda row: {key: (row[key] * 4)[:3] for key in ("input_ids", "attention_mask")})
            for each in (rows(16, 0), rows(16, 1))
        )
        adapted = run(tmp_path, DomainAlignmentTrainer, data=DomainPairs(source, target), weight=0.0)
        plain = run(tmp_path, TransferTrainer, data=source)
        for (name, one), other in zip(weights(adapted).items(), weights(plain).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)

    def test_accuracy_and_loss_of_the_critic_are_logged(self, tmp_path):
        logs = run(tmp_path, strength=0.0, changes={"num_train_epochs": 60}).state.log_history
        losses, accuracies = (
            [entry[f"domain_adversarial_{name}"] for entry in logs if "loss" in entry] for name in ("loss", "accuracy")
        )
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])  # a critic that nobody fools learns these rows by heart
        assert sum(accuracies[-10:]) > sum(accuracies[:10])
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)

    def test_every_epoch_pairs_anew(self, tmp_path):
        data, seen = pairs(), []

        class Seen(DomainPairs):
            def __getitems__(self, indices):
                found = super().__getitems__(indices)
                seen.extend((index, pair[1]["input_ids"]) for index, pair in zip(indices, found, strict=True))
                return found

        data.__class__ = Seen
        run(tmp_path, data=data, changes={"num_train_epochs": 3})
        epochs = [dict(seen[start : start + 16]) for start in (0, 16, 32)]
        assert epochs[0] != epochs[1] != epochs[2]

    @pytest.mark.parametrize("trainer", [DomainAdversarialTrainer, DomainAlignmentTrainer])
    def test_resumed_equals_straight(self, tmp_path, trainer):
        options = {"conditional": True} if trainer is DomainAdversarialTrainer else {"discrepancy": "joint_mmd"}
        changes = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
        straight = run(tmp_path / "straight", trainer, changes=changes, **options)
        for step in (1, 3, 5):
            resumed = trainer(
                tiny_bert(),
                arguments(tmp_path / "resumed", **changes),
                train_dataset=pairs(),
                data_collator=collate,
                **options,
            )
            resumed.train(resume_from_checkpoint=str(tmp_path / f"straight/checkpoint-{step}"))
            for (name, one), other in zip(weights(straight).items(), weights(resumed).values(), strict=True):
                assert torch.equal(one, other), (step, name)

    def test_everything_at_once(self, tmp_path):
        model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trainer = run(
            tmp_path,
            model=model,
            objectives=[Distillation(tiny_bert(seed=5), weight=0.5), L2SP(weight=0.1), MMD(weight=0.2)],
            unfreeze=GradualUnfreeze(until=0.5),
            layer_decay=0.9,
            changes={"num_train_epochs": 3},
        )
        names = {name for entry in trainer.state.log_history for name in entry}
        assert {"task_loss", "domain_adversarial_loss", "mmd_loss", "distillation_loss", "l2sp_loss"} <= names
        moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
        assert {"lora" in name or "classifier" in name for name in moved} == {True}

    def test_from_the_cache_of_the_frozen_prefix_it_is_the_same(self, tmp_path):
        options = {"unfreeze": TopLevels(1), "changes": {"num_train_epochs": 2}, "strength": 0.5}
        plain = run(tmp_path / "plain", **options)
        cached = run(
            tmp_path / "cached",
            frozen_prefix_cache=tmp_path / "cache",
            frozen_prefix_dtype="float32",
            **options,
        )
        for (name, one), other in zip(weights(plain).items(), weights(cached).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)

    def test_a_language_model_learns_from_the_source_alone(self, tmp_path):
        source, target = (language_rows(16, seed=seed).remove_columns("domain") for seed in (0, 1))
        trainer = run(
            tmp_path, DomainAlignmentTrainer, data=DomainPairs(source, target), model=tiny_llama(), fused_loss=True
        )
        assert trainer._head is not None  # no logits were needed
        logs = [entry for entry in trainer.state.log_history if "mmd_loss" in entry]
        assert all(math.isfinite(entry["mmd_loss"]) and entry["mmd_loss"] > 0 for entry in logs)

    def test_a_last_batch_of_one_pair_adds_no_discrepancy(self, tmp_path):
        for options in ({"estimator": "unbiased"}, {"estimator": "linear"}, {"discrepancy": "coral"}):
            trainer = run(tmp_path, DomainAlignmentTrainer, data=pairs(17, 12), **options)
            assert trainer.state.global_step == 3
            (name,) = {key for entry in trainer.state.log_history for key in entry} & {"mmd_loss", "coral_loss"}
            values = [entry[name] for entry in trainer.state.log_history if "loss" in entry]
            assert values[-1] == 0.0 != values[0]

    def test_float_labels_of_a_model_that_was_not_told_its_problem(self, tmp_path):
        labels = [[float(label), 0.0, 1.0] for label in rows(16, 0)["labels"]]
        source = rows(16, 0).remove_columns("labels").add_column("labels", labels)
        trainer = run(
            tmp_path, DomainAlignmentTrainer, data=DomainPairs(source, rows(16, 1)), eval_dataset=source, weight=0.0
        )
        losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
        assert all(0.3 < loss < 1.5 for loss in losses)
        assert "eval_target_entropy" not in trainer.evaluate()

    @pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
    def test_numbers_and_several_labels(self, tmp_path, problem):
        count = 1 if problem == "regression" else 3
        made = {
            "regression": lambda label: float(label),
            "multi_label_classification": lambda label: [float(label), 0.0, 1.0],
        }
        source = rows(16, 0)
        labels = [made[problem](label) for label in source["labels"]]
        source = source.remove_columns("labels").add_column("labels", labels)
        options = {"num_labels": count, "problem_type": problem}
        trainer = run(
            tmp_path, DomainAlignmentTrainer, data=DomainPairs(source, rows(16, 1)), model=tiny_bert(**options),
            weight=0.0, changes={"max_steps": 1},
        )  # fmt: skip
        model, batch = tiny_bert(**options), collate(list(source))
        first = next(entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry)
        losses = [model(**collate([row])).loss.item() for row in source]
        assert min(losses) <= first <= max(losses)  # -100 read as a number would make it thousands
        assert trainer.evaluate(source)["eval_loss"] == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-4)

    def test_streams(self, tmp_path):
        data = DomainStream(*(rows(12, seed).to_iterable_dataset() for seed in (0, 1)))
        assert run(tmp_path, data=data, changes={"max_steps": 3}).state.global_step == 3


REFUSED = {
    "one domain": (lambda tmp: run(tmp, data=rows(8, 0)), "found Dataset, expected DomainPairs"),
    "objective without pairs": (
        lambda tmp: run(tmp, TransferTrainer, data=rows(8, 0), objectives=[MMD()]),
        "mmd: train_dataset has one domain. Expected DomainPairs",
    ),
    "other number of domains": (
        lambda tmp: run(tmp, TransferTrainer, objectives=[MMD(domains=3)]),
        "mmd: domains = 3, but train_dataset has 2",
    ),
    "conditional regression": (
        lambda tmp: run(tmp, model=tiny_bert(num_labels=1), conditional=True),
        "conditional_adversarial: BertForSequenceClassification does not choose one class per example. Take d",
    ),
    "joint of a language model": (
        lambda tmp: run(tmp, DomainAlignmentTrainer, model=tiny_llama(), discrepancy="joint_mmd"),
        "joint_mmd: LlamaForCausalLM does not choose one class",
    ),
    "unbiased from one pair": (
        lambda tmp: run(
            tmp, DomainAlignmentTrainer, estimator="unbiased", changes={"per_device_train_batch_size": 1}
        ),
        "mmd: 1 pair in a batch, expected at least 2",
    ),
    "another label": (
        lambda tmp: run(tmp, model=BertForQuestionAnswering(tiny_bert().config)),
        "'(start|end)_positions' holds labels, which would be read of the target",
    ),
    "an unknown loss": (
        lambda tmp: run(tmp, model=BertForMultipleChoice(tiny_bert().config)),
        "BertForMultipleChoice is not known to leave out what has no label",
    ),
    "means below the cut": (
        lambda tmp: run(tmp, pooling="mean", unfreeze=TopLevels(0), frozen_prefix_cache=tmp / "cache"),
        "domain_adversarial takes features that may lie below the cut",
    ),
    "a discrepancy": (lambda tmp: run(tmp, DomainAlignmentTrainer, discrepancy="mdd"), "'mdd'. Did you mean 'mmd'"),
    "an estimator": (lambda tmp: run(tmp, DomainAlignmentTrainer, estimator="linea"), "Did you mean 'linear'"),
    "a pooling": (lambda tmp: run(tmp, pooling="bert.pooler.dens"), "Did you mean 'bert.pooler.dense'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(name, tmp_path):
    attempt, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        attempt(tmp_path)
