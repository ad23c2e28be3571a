"""Batch norm of two domains in one batch is that of one domain after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator

from hf_transfer import DomainAdversarialTrainer, DomainAlignmentTrainer, DomainPairs
from hf_transfer.adversarial import reverse_gradient
from hf_transfer.batch_norm import batch_norms, statistics_by_domain
from tests.tiny import arguments

SIZES = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", num_labels=3, **SIZES))


def images(count: int, shift: float, *, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    pixels = shift + torch.randn(count, 1, 16, 16, generator=generator)
    return [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixels)]


def trainer_of(model, folder, **changes) -> DomainAdversarialTrainer:
    pairs = DomainPairs(images(6, 0.0, seed=1), images(6, 2.0, seed=2))
    settings = arguments(folder, per_device_train_batch_size=6, **changes)
    return DomainAdversarialTrainer(
        model, settings, train_dataset=pairs, strength=0.7, hidden_size=8, data_collator=default_data_collator
    )


def test_a_step_is_that_of_two_passes(tmp_path):
    model = resnet()
    naive = copy.deepcopy(model).train()
    trainer = trainer_of(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model.train(), dict(batch)).backward()

    critic, loss = trainer.objectives[0].critic, torch.zeros(())
    for domain in (0, 1):
        rows = batch["domain"] == domain
        features = naive.resnet(batch["pixel_values"][rows]).pooler_output.flatten(1)
        if domain == 0:
            loss = loss + functional.cross_entropy(naive.classifier(features), batch["labels"][rows])
        guess = critic(reverse_gradient(features, 0.7))
        loss = loss + functional.cross_entropy(guess, torch.full((len(guess),), domain)) / 2
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), naive.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_it_can_be_left_out_and_is_for_a_discrepancy(tmp_path):
    pairs = DomainPairs(images(6, 0.0, seed=1), images(6, 2.0, seed=2))
    options = {"train_dataset": pairs, "data_collator": default_data_collator}
    model, settings = resnet(), arguments(tmp_path, per_device_train_batch_size=6)
    batch = next(iter(trainer_of(model, tmp_path).get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name != "domain"}
    expected = functional.cross_entropy(model.train()(inputs["pixel_values"]).logits, inputs["labels"])
    for kind, changes in (
        (DomainAlignmentTrainer, {"weight": 0.0}),
        (DomainAdversarialTrainer, {"weight": 0.0, "batch_norm_by_domain": False}),
    ):
        trainer = kind(model, settings, **options, **changes)
        torch.testing.assert_close(trainer.compute_loss(model.train(), dict(batch)), expected)


def test_a_source_row_does_not_depend_on_the_target():
    model, domain = resnet().train(), torch.tensor([0, 1, 0, 1, 0, 1])
    layers = batch_norms(model)
    assert len(layers) == sum("running_mean" in name for name in model.state_dict())
    pixels = torch.randn(6, 1, 16, 16)
    moved = torch.where(domain[:, None, None, None] == 1, 5 * pixels + 3, pixels)
    with torch.no_grad():
        with statistics_by_domain(layers, 2):
            ours, other = model(pixels).logits, model(moved).logits
        together, mixed = model(pixels).logits, model(moved).logits
    torch.testing.assert_close(ours[domain == 0], other[domain == 0])
    assert not torch.allclose(together[domain == 0], mixed[domain == 0], atol=1e-2)


def test_evaluation_is_left_alone_and_so_are_the_layers_afterwards():
    model, pixels = resnet().eval(), torch.randn(4, 1, 16, 16)
    expected = model(pixels).logits
    with statistics_by_domain(batch_norms(model), 2):
        assert torch.equal(model(pixels).logits, expected)
    assert all("forward" not in vars(layer) for layer in batch_norms(model))


def test_checkpointing_is_said(tmp_path, caplog):
    trainer_of(resnet(), tmp_path, gradient_checkpointing=True)
    assert "Batch norm takes both domains together" in caplog.text


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_one_domain_after_the_other(momentum):
    layer = torch.nn.BatchNorm1d(3, momentum=momentum)
    expected = copy.deepcopy(layer)
    rows = torch.randn(9, 3)
    with statistics_by_domain([layer], 3):
        found = layer(rows)
    for number in range(3):
        torch.testing.assert_close(found[number::3], expected(rows[number::3]))
    torch.testing.assert_close(layer.running_mean, expected.running_mean)
    torch.testing.assert_close(layer.running_var, expected.running_var)
