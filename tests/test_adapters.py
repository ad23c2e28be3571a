"""Bottleneck adapters: the paper's equations, and everything that PEFT does with a method of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_transfer.adapters import BottleneckConfig, BottleneckLayer
from hf_transfer.adapters.placements import BLOCK_ENDS
from hf_transfer.depth import block_names
from hf_transfer.errors import ConfigurationError
from hf_transfer.models import ModelSpec, load_model
from hf_transfer.recipe import Recipe
from tests.folders import write_encoder, write_sentiment
from tests.test_depth import FAMILIES, make
from tests.tiny import collate, text_rows, tiny_bert

KNOWN = [name for name in FAMILIES if name not in ("jina", "convnext", "resnet", "segformer", "mobilenet-v2")]
SUBLAYERS = {"t5": (2, 3), "bart": (2, 3), "whisper": (2, 3)}  # of a block of the encoder, and of the decoder


def batch():
    return collate([row for row in text_rows(6).remove_columns("domain")])


def adapted(model=None, *, seed: int = 0, random: bool = True, **options):
    """A BERT with adapters that do something."""
    torch.manual_seed(seed)
    config = BottleneckConfig(task_type="SEQ_CLS", init_weights=not random, **{"bottleneck_size": 4, **options})
    model = get_peft_model(model or tiny_bert(), config)
    if random:
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", KNOWN)
def test_every_block_gets_its_adapters_and_starts_as_it_was(family, placement):
    base = make(family)
    blocks = block_names(base)
    model = get_peft_model(make(family), BottleneckConfig(placement=placement, bottleneck_size=2)).eval()
    expected = len(blocks)
    if placement == "houlsby":
        encoder, decoder = SUBLAYERS.get(family, (2, 2))
        expected = sum(decoder if "decoder" in name and family in SUBLAYERS else encoder for name in blocks)
    layers = layers_of(model)
    assert len(layers) == expected
    for layer in layers:
        x = torch.randn(2, 3, next(p for p in layer.base_layer.parameters()).shape[0 if family == "gpt2" else 1])
        assert torch.equal(layer(x), layer.base_layer(x))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "bottleneck_" in name}


@pytest.mark.parametrize("model_type", BLOCK_ENDS)
def test_both_halves_of_every_block_of_an_architecture_are_found(model_type):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    attention, feed_forward = (
        [name for name in linear if re.fullmatch(rf".*\b({end})", name)] for end in BLOCK_ENDS[model_type]
    )
    crossing = [name for name in attention if "encoder_attn" in name or "EncDecAttention" in name]
    towers = 2 if model_type == "clip" else 1
    assert len(attention) - len(crossing) == len(feed_forward) == towers * len(block_names(model))


def test_an_architecture_that_is_not_known_says_what_to_give():
    with pytest.raises(ConfigurationError, match="where the blocks of 'segformer' end. Give target_modules"):
        get_peft_model(make("segformer"), BottleneckConfig())
    model = get_peft_model(make("segformer"), BottleneckConfig(target_modules=["mlp.fc2"], bottleneck_size=2))
    assert layers_of(model)


class Paper:
    """BERT's block with adapters, written from the papers: Devlin et al. 2019, and Houlsby et al. 2019, figure 2."""

    def __init__(self, model, activation, scaling):
        self.bert, self.activation, self.scaling = model.base_model.model.bert, activation, scaling

    def adapter(self, layer, hidden):
        if not isinstance(layer, BottleneckLayer):
            return hidden
        normed = hidden
        if "default" in layer.bottleneck_norm:
            norm = layer.bottleneck_norm["default"]
            mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, unbiased=False, keepdim=True)
            normed = (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        return hidden + self.scaling * (self.activation(normed @ down.weight.T + down.bias) @ up.weight.T + up.bias)

    def linear(self, layer, x):
        base = layer.base_layer if isinstance(layer, BottleneckLayer) else layer
        return self.adapter(layer, x @ base.weight.T + base.bias)

    def block(self, block, x, mask):
        attention = block.attention
        heads = attention.self.num_attention_heads
        q, k, v = (
            self.linear(part, x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (attention.self.query, attention.self.key, attention.self.value)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        x = attention.output.LayerNorm(x + self.linear(attention.output.dense, context))
        inner = functional.gelu(self.linear(block.intermediate.dense, x))
        return block.output.LayerNorm(x + self.linear(block.output.dense, inner))

    def hidden(self, input_ids, attention_mask, **_):
        x = self.bert.embeddings(input_ids)
        for block in self.bert.encoder.layer:
            x = self.block(block, x, attention_mask[:, None, None].bool())
        return x


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("activation", "function"), [("relu", torch.relu), ("gelu", functional.gelu), ("tanh", torch.tanh)]
)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_the_papers_equations(placement, activation, function, layer_norm):
    options = {"placement": placement, "activation": activation, "scaling": 0.7, "layer_norm": layer_norm}
    model = adapted(**options).double()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    found = model.base_model.model.bert(**inputs).last_hidden_state
    expected = Paper(model, function, 0.7).hidden(**inputs)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-10)


def test_only_the_chosen_blocks_and_what_is_below_them_gets_no_gradient():
    model = adapted(layers_to_transform=[2], placement="pfeiffer")
    (layer,) = layers_of(model)
    assert layer is model.base_model.model.bert.encoder.layer[2].output.dense
    seen = []
    model.base_model.model.bert.encoder.layer[1].output.register_full_backward_hook(lambda *_: seen.append(1))
    model(**batch()).loss.backward()
    assert not seen
    assert layer.bottleneck_down["default"].weight.grad.abs().max() > 0


def test_saved_and_loaded_it_is_the_same_and_as_large_as_its_weights(tmp_path):
    model, inputs = adapted(reduction_factor=4, bottleneck_size=None), batch()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = {name for name in tensors if "classifier" in name}
    features, width, count = 16, 4, 6
    assert sum(tensors[name].numel() for name in set(tensors) - head) == count * (
        2 * features * width + width + features
    )
    assert set(tensors) - head == {
        f"base_model.model.bert.encoder.layer.{block}.{end}.bottleneck_{part}.{kind}"
        for block in range(3)
        for end in ("attention.output.dense", "output.dense")
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK"
    assert config["placement"] == "houlsby"


def test_auto_classes_find_it(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = adapted(BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"))
    layers = layers_of(base)
    assert len(layers) == 6
    assert torch.equal(layers[0].bottleneck_up["default"].weight, layers_of(model)[0].bottleneck_up["default"].weight)


def test_a_fresh_process_reads_it_once_the_package_is_imported(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    adapted(BertForSequenceClassification.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    code = (
        "import sys, hf_transfer.adapters; from peft import AutoPeftModelForSequenceClassification as Auto; "
        "model = Auto.from_pretrained(sys.argv[1], num_labels=3); print(model.peft_config['default'].peft_type.value)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "adapter")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "BOTTLENECK"


def test_several_by_name_switched_disabled_stacked_and_deleted():
    inputs, model = batch(), adapted()
    plain = tiny_bert().eval()
    with model.disable_adapter():
        off = model.base_model.model.bert(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
    expected = plain.bert(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
    assert torch.equal(off, expected)
    first = model(**inputs).logits
    model.add_adapter("second", BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=3, init_weights=False))
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name and ".second" in name:
            nn.init.normal_(parameter, std=0.3)
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("second")
    assert not torch.allclose(model(**inputs).logits, first)
    layer, x = layers_of(model)[0], torch.randn(2, 16)
    for name in ("default", "second"):
        layer.set_adapter(name)
        h = layer.base_layer(x)
        torch.testing.assert_close(layer(x), h + layer._added(name, h))
    layer.set_adapter(["default", "second"])
    h = layer.base_layer(x)
    h = h + layer._added("default", h)
    torch.testing.assert_close(layer(x), h + layer._added("second", h))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(**inputs).logits, first)
    assert not any("second" in name for name, _ in model.named_parameters())


def test_it_is_not_merged_and_unloads_to_the_base():
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="cannot be merged: it has an activation"):
            merge()
    base = model.unload()
    assert not layers_of(base)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    assert torch.equal(base.bert(**inputs).last_hidden_state, tiny_bert().eval().bert(**inputs).last_hidden_state)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_learns_with_bfloat16_under_autocast_and_checkpointing(checkpointing):
    model = adapted(random=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    losses = []
    for _ in range(100):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_on_a_quantised_base(bits, tmp_path):
    spec = ModelSpec(str(write_encoder(tmp_path / "base")), quantization=bits)

    def base():
        return load_model(spec, label_names=["a", "b", "c"], problem_type="single_label_classification")

    model, inputs = adapted(base()), batch()
    kinds = {type(layer.base_layer).__name__ for layer in layers_of(model)}
    assert kinds == {{"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]}
    model(**inputs).loss.backward()
    assert all(layer.bottleneck_up["default"].weight.grad.abs().max() > 0 for layer in layers_of(model))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "houlsbi"}, "placement = 'houlsbi'. Did you mean 'houlsby'"),
        ({"activation": "gelo"}, "activation = 'gelo'. Did you mean 'gelu'"),
        ({"reduction_factor": 0}, "reduction_factor = 0: expected more than 0"),
        ({"bottleneck_size": 0}, "bottleneck_size = 0: expected 1 or more"),
        ({"dropout": 1.0}, "dropout = 1.0: expected a share"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        BottleneckConfig(**options)


def test_a_target_that_is_no_linear_layer_is_named():
    with pytest.raises(ConfigurationError, match="LayerNorm' is LayerNorm, expected a linear layer"):
        get_peft_model(tiny_bert(), BottleneckConfig(target_modules=["output.LayerNorm"]))


def test_the_type_is_a_member_like_any_other():
    assert PeftType["BOTTLENECK"] is PeftType("BOTTLENECK")
    assert PeftType.BOTTLENECK == "BOTTLENECK"
    assert PeftType.BOTTLENECK in list(PeftType)


def test_a_recipe_trains_it_and_its_head(tmp_path):
    values = {
        "recipe": "fine_tune",
        "model": {"name": str(write_encoder(tmp_path / "base"))},
        "data": {"path": "json", "data_files": write_sentiment(tmp_path / "data", train=64)},
        "adapter": {"method": "bottleneck", "bottleneck_size": 16, "placement": "houlsby"},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        },
    }
    result = Recipe.from_values(values).run()
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in tensors.items() if "bottleneck_up" in name)
    assert any("classifier" in name for name in tensors)
    assert result.metrics["trainable_parameters"] == sum(value.numel() for value in tensors.values())
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=2)
    assert len(layers_of(again)) == 6
    with pytest.raises(ConfigurationError, match="adapter.bottleneck_sise = 8: .*'bottleneck_size'"):
        Recipe.from_values({**values, "adapter": {"method": "bottleneck", "bottleneck_sise": 8}})
