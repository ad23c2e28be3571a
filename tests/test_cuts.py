"""A model run from a cut gives the gradients that it gives when run from the bottom, and is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_transfer.cuts import CutModel, Replay, Tap, evaluating, skipping_zero_layers
from hf_transfer.depth import parameter_depths
from hf_transfer.errors import ConfigurationError
from hf_transfer.heads import add_mean_pooling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

# Weights large enough for a block not to be almost the identity.
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3,
         "initializer_range": 0.2}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
DISTIL = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50, "initializer_range": 0.2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
DEBERTA = {
    **TEXT,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "conv_kernel_size": 3,
    "position_buckets": 8,
}
SPEECH = {**SIZES, "conv_dim": (8, 8), "conv_kernel": (6, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family, and what its head is known to read."""

    model: str
    config: str
    settings: dict
    head: Tap
    batch: str = "text"

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))


FIRST, LAST, TOKENS = (Tap("last_hidden_state", positions) for positions in ("first", "last", "tokens"))
FAMILIES = {
    "bert": Family("BertForSequenceClassification", "BertConfig", TEXT, Tap("pooler_output", "vector")),
    "bert-tokens": Family("BertForTokenClassification", "BertConfig", TEXT, TOKENS, "tagged"),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", TEXT, FIRST),
    "electra": Family("ElectraForSequenceClassification", "ElectraConfig", TEXT, FIRST),
    "distilbert": Family("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, FIRST),
    "deberta": Family("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA, FIRST),
    "modernbert": Family(
        "ModernBertForSequenceClassification", "ModernBertConfig", {**TEXT, "classifier_pooling": "mean"}, TOKENS
    ),
    "llama": Family("LlamaForSequenceClassification", "LlamaConfig", TEXT, LAST),
    "llama-left": Family("LlamaForSequenceClassification", "LlamaConfig", TEXT, LAST, "left"),
    "llama-lm": Family("LlamaForCausalLM", "LlamaConfig", TEXT, TOKENS, "tagged"),
    "qwen3": Family("Qwen3ForSequenceClassification", "Qwen3Config", GROUPED, LAST),
    "vit": Family("ViTForImageClassification", "ViTConfig", IMAGE, FIRST, "image"),
    "wav2vec2": Family("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", SPEECH, TOKENS, "speech"),
}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    """Four examples of different lengths."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 1, 0])
    if kind == "image":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": labels}
    if kind == "speech":
        mask = (torch.arange(120) < torch.tensor([120, 80, 97, 61])[:, None]).long()
        return {
            "input_values": torch.randn(4, 120, generator=generator) * mask,
            "attention_mask": mask,
            "labels": labels,
        }
    mask = (torch.arange(9) < torch.tensor([9, 3, 7, 5])[:, None]).long()
    if kind == "left":
        mask = mask.flip(1)
    tokens = torch.randint(3, 50, (4, 9), generator=generator) * mask
    if kind == "tagged":
        labels = (tokens % 2).masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], *, above: int) -> dict[str, torch.Tensor]:
    depths = parameter_depths(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(depths[name] > above)
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@contextmanager
def must_not_run(modules: list[nn.Module]) -> Iterator[None]:
    def fail(module, _):
        raise AssertionError(f"{type(module).__name__} ran below the cut")

    leaves = [leaf for module in modules for leaf in module.modules() if not list(leaf.children())]
    hooks = [leaf.register_forward_pre_hook(fail) for leaf in leaves]
    yield
    for hook in hooks:
        hook.remove()


def assert_replays(model: nn.Module, batch: dict[str, torch.Tensor], call: Callable = lambda model: model) -> None:
    """At every depth, gradients of the open part are those of an ordinary pass with the frozen part in eval mode."""
    model.eval()
    cut = CutModel(model)
    top = len(cut.blocks)
    with evaluating(model):
        replay = Replay(cut, inputs(batch), range(top + 1))
        boundaries = cut.run(inputs(batch), [replay.taps[depth] for depth in range(top + 1)])
    for depth, boundary in enumerate(boundaries):
        expected = gradients(model, batch, above=depth)
        replay.install(depth)
        below = cut.blocks[:depth]
        with must_not_run([cut.base] if depth == top else below), replay.feed(boundary, torch.arange(4), batch):
            found = gradients(call(model), batch, above=depth)
        replay.uninstall()
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_above_every_cut(name):
    family = FAMILIES[name]
    assert_replays(family.make(), batch_of(family.batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_head_reads(name):
    family = FAMILIES[name]
    model = family.make().eval()
    assert CutModel(model).head_tap(inputs(batch_of(family.batch))) == family.head


def test_what_a_head_of_zeros_reads():
    """Its logits do not follow what it reads, yet."""
    model = FAMILIES["llama"].make().eval()
    with torch.no_grad():
        model.score.weight.zero_()
    assert CutModel(model).head_tap(inputs(batch_of("text"))) == LAST


def test_of_audio_the_real_frames_are_kept():
    model, batch = FAMILIES["wav2vec2"].make().eval(), inputs(batch_of("speech"))
    kept = CutModel(model).run(batch, [Tap(1)])[0]
    assert kept.lengths.tolist() == model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1)).tolist()
    assert len(set(kept.lengths.tolist())) == 4


def fresh_lora() -> nn.Module:
    return get_peft_model(FAMILIES["bert"].make(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def test_lora():
    model = get_peft_model(
        FAMILIES["bert"].make(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    )
    assert_replays(model, batch_of("text"))


def test_inside_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_replays(
            FAMILIES["bert"].make(),
            batch_of("text"),
            lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
        )
    finally:
        torch.distributed.destroy_process_group()


def test_with_activation_checkpointing():
    model = FAMILIES["llama"].make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_replays(model, batch_of("text"), lambda model: model.train())


def test_training_mode_drops_nothing_below_the_cut():
    model = FAMILIES["bert"].make()
    cut, batch = CutModel(model), inputs(batch_of("text"))
    with evaluating(model):
        replay = Replay(cut, batch, [2])
        boundary = cut.run(batch, [replay.taps[2]])[0]
    model.train()
    cut.blocks[2].eval()
    replay.install(2)
    with replay.feed(boundary, torch.arange(4), batch):
        trained = cut.base(**batch).last_hidden_state
    replay.uninstall()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(trained[real], model.eval().base_model(**batch).last_hidden_state[real])


def test_passes_outside_feed_are_ordinary():
    model = FAMILIES["bert"].make().eval()
    cut, batch = CutModel(model), inputs(batch_of("text"))
    expected = model(**batch).logits
    other = {**batch, "input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    with evaluating(model):
        replay = Replay(cut, batch, [3])
        boundary = cut.run(batch, [replay.taps[3]])[0]
    replay.install(3)
    with replay.feed(boundary, torch.arange(4), batch):
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**other).logits, expected.flip(0))
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 4


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_layers_below_the_cut_cannot_be_asked_for(wanted):
    model = FAMILIES["bert"].make().eval()
    cut, batch = CutModel(model), inputs(batch_of("text"))
    with evaluating(model):
        replay = Replay(cut, batch, [2])
        boundary = cut.run(batch, [replay.taps[2]])[0]
    replay.install(2)
    with replay.feed(boundary, torch.arange(4), batch), pytest.raises(ConfigurationError, match=wanted):
        model(**batch, **{wanted: True})


UNCUT = {
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config",
                        {"d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 32, "vocab_size": 50}),
    "hierarchical": ("SwinForImageClassification", "SwinConfig",
                     {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4}),
    "shared blocks": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCUT)
def test_models_that_are_no_line_of_blocks_are_refused(kind):
    name, config, settings = UNCUT[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    batch = batch_of("image" if kind == "hierarchical" else "text")
    if kind == "hierarchical":
        batch["pixel_values"] = torch.randn(4, 3, 32, 32)
    with pytest.raises(ConfigurationError, match=f"{name}.*cut"), torch.no_grad():
        Replay(CutModel(model), inputs(batch), [0])


def test_blocks_that_pass_on_more_than_hidden_states_are_refused():
    """A connection from the first block to the third: replayed above the first, it would compute another thing."""
    model = FAMILIES["bert"].make().eval()
    first, _, third = model.bert.encoder.layer
    seen = []
    first.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    third.register_forward_hook(lambda _, args, output: output + seen.pop())
    with pytest.raises(ConfigurationError, match="cannot be cut above depth 1"), torch.no_grad():
        Replay(CutModel(model), inputs(batch_of("text")), [0, 1])


def test_virtual_tokens_are_refused():
    model = get_peft_model(FAMILIES["bert"].make(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ConfigurationError, match="Virtual tokens"):
        CutModel(model)


def test_a_bare_model_has_no_head():
    model = FAMILIES["bert"].make().bert.eval()
    with pytest.raises(ConfigurationError, match="BertModel has no head"):
        CutModel(model).head_tap(inputs(batch_of("text")))


def test_a_head_that_reads_two_fields_is_refused():
    model = FAMILIES["bert"].make().eval()
    model.classifier.register_forward_pre_hook(lambda _, args: (args[0] + seen[-1][0].mean(1),))
    seen = []
    model.bert.register_forward_hook(lambda _, args, output: seen.append(output))
    with pytest.raises(ConfigurationError, match="more than one field"), torch.no_grad():
        CutModel(model).head_tap(inputs(batch_of("text")))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [lambda: add_mean_pooling(FAMILIES["bert"].make()), fresh_lora])
def test_layers_of_zeros_are_skipped(make, autocast):
    model, batch = make().eval(), inputs(batch_of("text"))
    zero = [module for module in model.modules() if isinstance(module, nn.Linear) and not module.weight.any()]
    zero = [module for module in zero if module.bias is None or not module.bias.any()]
    assert len(zero) >= 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        expected = model(**batch).logits
        with skipping_zero_layers(model):
            calls = [vars(module).get("forward") for module in zero]
            torch.testing.assert_close(model(**batch).logits, expected)
    assert all(calls)
    assert not any("forward" in vars(module) for module in model.modules())


def test_evaluating_restores_every_module():
    model = FAMILIES["bert"].make().train()
    model.bert.pooler.eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
