"""Depth over tiny random models of every family: where parameters sit, checked against what a forward pass does."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_transfer.depth import block_names, embedding_names, head_names, parameter_depths
from hf_transfer.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
SPEECH = {**SIZES, "vocab_size": 50, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4),
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip
ENCODER_DECODER = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
                   "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is expected of a family; names are relative to the base model.

    Args:
        base: The base model's name in a model with a head; ``own_base`` lists tasks with another one.
        spots: Some parameters of the bare model and their depths.
        embeddings: As ``embedding_names`` of the bare model.
        heads: Task to ``head_names``.
        shared: Modules at depth 0 that run before block 1 without making its input.
    """

    config: transformers.PreTrainedConfig
    base: str
    blocks: int
    spots: dict[str, int]
    embeddings: list[str]
    heads: dict[str, list[str]]
    own_base: dict[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()


ENCODER_HEADS = {"SequenceClassification": ["classifier"], "TokenClassification": ["classifier"]}
DECODER_HEADS = {"SequenceClassification": ["score"], "TokenClassification": ["score"], "CausalLM": ["lm_head"]}
DECODER_SPOTS = {"embed_tokens.weight": 0, "layers.0.self_attn.q_proj.weight": 1, "layers.2.mlp.down_proj.weight": 3,
                 "norm.weight": 3}  # fmt: skip
SPEECH_SPOTS = {"masked_spec_embed": 0, "feature_extractor.conv_layers.1.conv.weight": 0,
                "feature_projection.projection.weight": 0, "encoder.pos_conv_embed.conv.bias": 0,
                "encoder.layers.0.attention.k_proj.weight": 1, "encoder.layers.2.layer_norm.weight": 3}  # fmt: skip
SPEECH_HEADS = {"AudioClassification": ["projector", "classifier"], "CTC": ["lm_head"]}

FAMILIES = {
    "bert": Family(
        transformers.BertConfig(**TEXT), "bert", 3,
        {"embeddings.LayerNorm.bias": 0, "encoder.layer.0.attention.self.query.weight": 1,
         "encoder.layer.2.output.dense.bias": 3, "pooler.dense.weight": 3},
        ["embeddings"], {**ENCODER_HEADS, "MaskedLM": ["cls"], "QuestionAnswering": ["qa_outputs"]},
    ),
    "distilbert": Family(
        transformers.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=50), "distilbert", 3,
        {"embeddings.word_embeddings.weight": 0, "transformer.layer.1.ffn.lin1.weight": 2},
        ["embeddings"], {**ENCODER_HEADS, "SequenceClassification": ["pre_classifier", "classifier"]},
    ),
    "roberta": Family(
        transformers.RobertaConfig(**TEXT), "roberta", 3,
        {"embeddings.position_embeddings.weight": 0, "encoder.layer.1.intermediate.dense.weight": 2},
        ["embeddings"], {**ENCODER_HEADS, "MaskedLM": ["lm_head"]},
    ),
    "deberta-v2": Family(
        transformers.DebertaV2Config(
            **TEXT, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, conv_kernel_size=3,
        ), "deberta", 3,
        {"encoder.rel_embeddings.weight": 0, "encoder.LayerNorm.weight": 0, "encoder.conv.conv.weight": 1,
         "encoder.layer.0.output.dense.weight": 1, "encoder.layer.2.output.LayerNorm.weight": 3},
        ["embeddings"], {**ENCODER_HEADS, "SequenceClassification": ["pooler", "classifier"]},
        shared=("encoder.LayerNorm",),
    ),
    "electra": Family(
        transformers.ElectraConfig(**TEXT, embedding_size=8), "electra", 3,
        {"embeddings_project.weight": 0, "encoder.layer.0.output.dense.weight": 1},
        ["embeddings", "embeddings_project"], ENCODER_HEADS,
    ),
    "modernbert": Family(
        transformers.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2), "model", 3,
        {"embeddings.norm.weight": 0, "layers.0.mlp.Wi.weight": 1, "final_norm.weight": 3},
        ["embeddings"],
        {"SequenceClassification": ["head", "classifier"], "TokenClassification": ["head", "classifier"]},
    ),
    "jina": Family(  # registers its pooler before its blocks
        transformers.JinaEmbeddingsV3Config(**TEXT), "roberta", 3,
        {"embeddings.LayerNorm.weight": 0, "layers.1.mlp.fc1.weight": 2, "pooler.dense.weight": 3},
        ["embeddings"], ENCODER_HEADS,
    ),
    "llama": Family(
        transformers.LlamaConfig(**TEXT), "model", 3, DECODER_SPOTS,
        ["embed_tokens"], {**DECODER_HEADS, "QuestionAnswering": ["qa_outputs"]},
        own_base={"QuestionAnswering": "transformer"},
    ),
    "qwen3": Family(transformers.Qwen3Config(**GROUPED), "model", 3, DECODER_SPOTS, ["embed_tokens"], DECODER_HEADS),
    "mistral": Family(
        transformers.MistralConfig(**GROUPED), "model", 3, DECODER_SPOTS, ["embed_tokens"], DECODER_HEADS
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig(**GROUPED), "model", 3, DECODER_SPOTS,
        ["embed_tokens"], {"SequenceClassification": ["score"], "CausalLM": []},
    ),
    "gpt2": Family(
        transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        ), "transformer", 3,
        {"wte.weight": 0, "wpe.weight": 0, "h.0.attn.c_attn.weight": 1, "h.2.mlp.c_proj.bias": 3, "ln_f.weight": 3},
        ["wte", "wpe", "drop"],
        {"SequenceClassification": ["score"], "TokenClassification": ["classifier"], "CausalLM": []},
    ),
    "opt": Family(
        transformers.OPTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, vocab_size=50, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, word_embed_proj_dim=8, max_position_embeddings=32,
        ), "model", 3,
        {"decoder.embed_positions.weight": 0, "decoder.project_in.weight": 0, "decoder.layers.0.fc1.weight": 1,
         "decoder.layers.0.final_layer_norm.weight": 1, "decoder.final_layer_norm.weight": 3,
         "decoder.project_out.weight": 3},
        ["decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"],
        {"SequenceClassification": ["score"], "CausalLM": []},
    ),
    "phi": Family(
        transformers.PhiConfig(**TEXT), "model", 3,
        {"embed_tokens.weight": 0, "layers.1.self_attn.dense.bias": 2, "final_layernorm.weight": 3},
        ["embed_tokens", "embed_dropout"], DECODER_HEADS,
    ),
    "t5": Family(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=50,
            decoder_start_token_id=0, eos_token_id=2,
        ), "transformer", 5,
        {"shared.weight": 0, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 1,
         "encoder.block.2.layer.1.DenseReluDense.wo.weight": 3, "encoder.final_layer_norm.weight": 3,
         "decoder.block.0.layer.1.EncDecAttention.q.weight": 4, "decoder.block.1.layer.2.layer_norm.weight": 5,
         "decoder.final_layer_norm.weight": 5},
        ["encoder.embed_tokens"],
        {"SequenceClassification": ["classification_head"], "TokenClassification": ["classifier"], "Seq2SeqLM": [],
         "QuestionAnswering": ["qa_outputs"]},
        own_base={"Seq2SeqLM": "", "QuestionAnswering": ""},
    ),
    "bart": Family(
        transformers.BartConfig(**ENCODER_DECODER, max_position_embeddings=32), "model", 5,
        {"shared.weight": 0, "encoder.layernorm_embedding.weight": 0, "encoder.layers.2.fc2.weight": 3,
         "decoder.embed_positions.weight": 0, "decoder.layernorm_embedding.weight": 0,
         "decoder.layers.0.fc1.weight": 4},
        ["encoder.embed_tokens", "encoder.embed_positions", "encoder.layernorm_embedding"],
        {"SequenceClassification": ["classification_head"], "Seq2SeqLM": []},
    ),
    "vit": Family(
        transformers.ViTConfig(**IMAGE), "vit", 3,
        {"embeddings.cls_token": 0, "layers.0.mlp.fc1.weight": 1, "layernorm.weight": 3, "pooler.dense.weight": 3},
        ["embeddings"], {"ImageClassification": ["classifier"]},
    ),
    "dinov2": Family(
        transformers.Dinov2Config(**IMAGE), "dinov2", 3,
        {"embeddings.mask_token": 0, "encoder.layer.0.layer_scale1.lambda1": 1, "layernorm.weight": 3},
        ["embeddings"], {"ImageClassification": ["classifier"]},
    ),
    "dinov3": Family(  # its base model prefix names the encoder alone
        transformers.DINOv3ViTConfig(**IMAGE), "model", 3,
        {"embeddings.cls_token": 0, "model.layer.0.mlp.up_proj.weight": 1, "norm.weight": 3},
        ["embeddings"], {},
    ),
    "swin": Family(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2
        ), "swin", 3,
        {"embeddings.norm.weight": 0, "encoder.layers.0.blocks.0.mlp.fc1.weight": 1,
         "encoder.layers.0.downsample.reduction.weight": 2, "encoder.layers.1.blocks.0.mlp.fc1.weight": 2,
         "encoder.layers.1.blocks.1.mlp.fc1.weight": 3, "layernorm.weight": 3},
        ["embeddings"], {"ImageClassification": ["classifier"]},
    ),
    "convnext": Family(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], image_size=32), "convnext", 5,
        {"embeddings.layernorm.weight": 0, "encoder.stages.0.layers.0.dwconv.weight": 1,
         "encoder.stages.1.downsampling_layer.1.weight": 2, "encoder.stages.2.downsampling_layer.0.weight": 3,
         "encoder.stages.2.layers.1.dwconv.weight": 4, "encoder.stages.3.downsampling_layer.1.weight": 5,
         "layernorm.weight": 5},
        ["embeddings"], {"ImageClassification": ["classifier"]},
    ),
    "resnet": Family(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
        "resnet", 3,
        {"embedder.embedder.convolution.weight": 0, "encoder.stages.0.layers.0.layer.0.convolution.weight": 1,
         "encoder.stages.1.layers.1.layer.0.convolution.weight": 3},
        ["embedder"], {"ImageClassification": ["classifier"]},
    ),
    "segformer": Family(  # embeds anew in every stage
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 2], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        ), "segformer", 3,
        {"stages.0.patch_embeddings.proj.weight": 0, "stages.0.layer_norm.weight": 1,
         "stages.1.patch_embeddings.proj.weight": 2, "stages.1.layer_norm.weight": 3},
        ["stages.0.patch_embeddings"], {"ImageClassification": ["classifier"]},
    ),
    "mobilenet-v2": Family(
        transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25), "mobilenet_v2", 16,
        {"conv_stem.reduce_1x1.convolution.weight": 0, "layer.0.expand_1x1.convolution.weight": 1,
         "layer.15.reduce_1x1.convolution.weight": 16, "conv_1x1.convolution.weight": 16},
        ["conv_stem"], {"ImageClassification": ["classifier"]},
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Config(**SPEECH), "wav2vec2", 3, {**SPEECH_SPOTS, "encoder.layer_norm.weight": 0},
        ["feature_extractor", "feature_projection", "encoder.pos_conv_embed", "encoder.layer_norm", "encoder.dropout"],
        SPEECH_HEADS,
    ),
    "wav2vec2-stable": Family(  # the same names, but the norm comes after the blocks
        transformers.Wav2Vec2Config(**SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer"), "wav2vec2", 3,
        {**SPEECH_SPOTS, "encoder.layer_norm.weight": 3},
        ["feature_extractor", "feature_projection", "encoder.pos_conv_embed", "encoder.dropout"],
        SPEECH_HEADS,
    ),
    "whisper": Family(
        transformers.WhisperConfig(
            **ENCODER_DECODER, max_source_positions=20, max_target_positions=20, num_mel_bins=8, classifier_proj_size=8
        ), "model", 5,
        {"encoder.conv1.weight": 0, "encoder.embed_positions.weight": 0, "encoder.layer_norm.weight": 3,
         "decoder.embed_positions.weight": 0, "decoder.layers.0.fc1.weight": 4, "decoder.layer_norm.weight": 5},
        ["encoder.conv1", "encoder.conv2", "encoder.embed_positions"],
        {"SpeechSeq2Seq": [], "AudioClassification": ["projector", "classifier"]},
        own_base={"AudioClassification": ""},
    ),
}  # fmt: skip
ROWS = [(name, task) for name, family in FAMILIES.items() for task in ["", *family.heads]]


def make(family: str, task: str = "") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    return auto.from_config(copy.deepcopy(FAMILIES[family].config)).eval()  # some classes write into it


def full(base: str, name: str) -> str:
    return f"{base}.{name}".lstrip(".")


def base_of(family: str, task: str) -> str:
    return FAMILIES[family].own_base.get(task, FAMILIES[family].base) if task else ""


def random_inputs(model: transformers.PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 50, (2, 7), generator=generator)
    tokens[:, -1] = 2  # BART and T5 classify the end of sequence
    size = getattr(model.config, "image_size", 32)
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "input_values": torch.randn(2, 400, generator=generator),
        "input_features": torch.randn(2, 8, 40, generator=generator),
    }
    chosen = {model.main_input_name: inputs[model.main_input_name]}
    takes_two = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {**chosen, "decoder_input_ids": tokens} if takes_two else chosen


def forward(model: transformers.PreTrainedModel, hooks: list[RemovableHandle], *, seed: int) -> None:
    """One forward pass, after which the hooks are removed."""
    with torch.no_grad():
        model(**random_inputs(model, seed))
    for hook in hooks:
        hook.remove()


def run_order(model: transformers.PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the modules that run in a forward pass, each where it first does."""
    order: dict[str, None] = {}
    modules = {name: model.get_submodule(name) for name in names}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name, module in modules.items()
    ]
    forward(model, hooks, seed=0)
    return list(order)


def input_of_block_1(
    model: transformers.PreTrainedModel, on_output: dict[str, Callable], *, seed: int
) -> torch.Tensor:
    """The hidden states that reach block 1 while some modules' outputs are noted or replaced."""
    seen = []
    block = model.get_submodule(block_names(model)[0])
    hooks = [model.get_submodule(name).register_forward_hook(hook) for name, hook in on_output.items()]
    hooks.append(
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
    )
    forward(model, hooks, seed=seed)
    return seen[0]


def parameter_owners(model: nn.Module) -> dict[str, int]:
    """The modules that own parameters themselves, and the depth of these."""
    return {name.rpartition(".")[0]: depth for name, depth in parameter_depths(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_bare_model(family):
    expected, model = FAMILIES[family], make(family)
    depths = parameter_depths(model)
    assert list(depths) == [name for name, _ in model.named_parameters()]
    assert set(depths.values()) == set(range(expected.blocks + 1))
    assert {name: depths[name] for name in expected.spots} == expected.spots
    blocks = block_names(model)
    assert len(blocks) == expected.blocks
    for index, block in enumerate(blocks):
        assert {depths[full(block, name)] for name, _ in model.get_submodule(block).named_parameters()} == {index + 1}
    assert embedding_names(model) == expected.embeddings
    assert head_names(model) == []


@pytest.mark.parametrize(("family", "task"), [row for row in ROWS if row[1]])
def test_a_head_is_above_the_same_base(family, task):
    model, base, bare = make(family, task), base_of(family, task), parameter_depths(make(family))
    depths, heads = parameter_depths(model), head_names(model)
    assert list(depths) == [name for name, _ in model.named_parameters()]
    assert heads == FAMILIES[family].heads[task]
    assert {name for name, _ in model.named_modules()} >= {*heads, *block_names(model), *embedding_names(model)}
    assert embedding_names(model) == [full(base, name) for name in FAMILIES[family].embeddings]
    top = len(block_names(model)) + 1
    assert (top in depths.values()) == bool(heads)
    for name, depth in depths.items():
        in_head = name.startswith(tuple(f"{head}." for head in heads))
        assert depth == (top if in_head else bare[name.removeprefix(f"{base}.")]), name


@pytest.mark.parametrize(("family", "task"), ROWS)
def test_depth_rises_in_execution_order(family, task):
    model = make(family, task)
    depths = parameter_owners(model)
    order = run_order(model, depths)
    decoder = [name for name in order if model.config.is_encoder_decoder and "decoder" in name.split(".")]
    for tower in ([name for name in order if name not in decoder], decoder):
        along = [depths[name] for name in tower]
        assert along == sorted(along), [(name, depths[name]) for name in tower]
    assert {depths[name] for name in order} >= set(depths.values()) - {0}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_below_block_1_runs(family):
    model = make(family)
    embeddings, block = embedding_names(model), block_names(model)[0]
    assert run_order(model, embeddings) == embeddings
    order = run_order(model, [*parameter_owners(model), block])
    below = [name for name in order[: order.index(block)] if name not in ("", *FAMILIES[family].shared)]
    assert all(f"{name}.".startswith(tuple(f"{embedding}." for embedding in embeddings)) for name in below), below


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_decide_the_input_of_block_1(family):
    model, known = make(family), {}
    embeddings = embedding_names(model)
    note = {name: lambda _, __, output, name=name: known.update({name: output}) for name in embeddings}
    expected = input_of_block_1(model, note, seed=1)
    assert not torch.equal(input_of_block_1(model, {}, seed=2), expected)
    replay = {name: lambda *_, name=name: known[name] for name in embeddings}
    torch.testing.assert_close(input_of_block_1(model, replay, seed=2), expected)
    for name in embeddings:
        changed = input_of_block_1(model, {name: lambda _, __, output: disturbed(output)}, seed=1)
        assert not torch.allclose(changed, expected), name


def disturbed(output):
    if isinstance(output, tuple):
        return (disturbed(output[0]), *output[1:])
    return output + torch.randn(output.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("family", "task"), [("bart", "CausalLM"), ("whisper", "CausalLM")])
def test_a_decoder_alone_starts_at_1(family, task):
    model = make(family, task)
    depths = parameter_depths(model)
    assert block_names(model) == ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert set(depths.values()) == {0, 1, 2}
    assert embedding_names(model)[:2] == ["model.decoder.embed_tokens", "model.decoder.embed_positions"]


def adaptable(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    return isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)) and getattr(layer, "groups", 1) == 1


LORA_TASKS = {"": None, "SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM",
              "ImageClassification": None, "AudioClassification": None}  # fmt: skip


@pytest.mark.parametrize(("family", "task"), [row for row in ROWS if row[1] in LORA_TASKS])
def test_lora_sits_where_the_layer_it_adapts_sits(family, task):
    model = make(family, task)
    bare, owners, kind = parameter_depths(model), parameter_owners(model), LORA_TASKS[task]
    targets = [name for name, depth in owners.items() if depth <= len(block_names(model)) and adaptable(model, name)]
    saved = None if kind else head_names(model) or None
    settings = LoraConfig(r=2, target_modules=targets, task_type=kind, modules_to_save=saved)
    adapted = get_peft_model(model, settings)

    depths = parameter_depths(adapted)
    assert list(depths) == [name for name, _ in adapted.named_parameters()]
    assert sum("lora_" in name for name in depths) == 2 * len(targets)
    for name, depth in depths.items():
        name = re.sub(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)\b", "", name)
        layer = name.partition(".lora_")[0]
        assert depth == (bare[name] if layer == name else owners[layer]), name
    for names in (block_names, embedding_names, head_names):
        assert names(adapted) == [f"base_model.model.{name}" for name in names(make(family, task))]


def test_adapters_of_transformers_and_virtual_tokens():
    model = make("bert", "SequenceClassification")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    depths = parameter_depths(model)
    assert depths["bert.encoder.layer.1.attention.self.query.lora_B.default.weight"] == 2
    assert depths["classifier.modules_to_save.default.weight"] == 4
    assert head_names(model) == ["classifier"]

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    depths = parameter_depths(get_peft_model(make("llama", "CausalLM"), settings))
    assert depths["prompt_encoder.default.embedding.weight"] == 0
    assert depths["base_model.lm_head.weight"] == 4


def test_untied_copy_of_a_tied_head_is_a_head():
    settings = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(make("gpt2", "CausalLM"), settings)
    assert parameter_depths(model)["base_model.model.lm_head.modules_to_save.default.weight"] == 4
    assert head_names(model) == ["base_model.model.lm_head"]


def test_precision_does_not_matter():
    model = make("bert", "SequenceClassification")
    expected = parameter_depths(model)
    for module in model.bert.modules():
        if isinstance(module, nn.Linear):
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
    assert parameter_depths(model) == expected


class Wrapper(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_sees_through_a_wrapper():
    assert block_names(Wrapper(module=make("bert")))[0] == "module.encoder.layer.0"
    assert parameter_depths(Wrapper(module=make("bert")))["module.pooler.dense.bias"] == 3


def with_part(model: nn.Module, path: str, part: nn.Module | nn.Parameter, *, first: bool = False) -> nn.Module:
    name = path.rpartition(".")[2]
    parent = model.get_submodule(path.rpartition(".")[0])
    setattr(parent, name, part)
    if first:
        parent._modules = {name: part, **parent._modules}
    return model


def clip() -> nn.Module:
    text, vision = transformers.CLIPTextConfig(**TEXT), transformers.CLIPVisionConfig(**IMAGE)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


class Flat(transformers.BertPreTrainedModel):
    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4)


UNCERTAIN = {
    "part of the base": (
        lambda: with_part(make("bert", "MaskedLM"), "bert.critic", nn.Linear(2, 2)), "bert.critic.weight"
    ),
    "part of a bare model": (lambda: with_part(make("vit"), "head", nn.Linear(2, 2)), "head.weight"),
    "parameter of the base": (lambda: with_part(make("bert"), "scale", nn.Parameter(torch.ones(2))), "scale"),
    "list beside the blocks": (
        lambda: with_part(make("llama"), "more_norms", nn.ModuleList([nn.LayerNorm(2)])), "more_norms.0.weight",
    ),
    "head of a bare model": (lambda: with_part(make("t5"), "lm_head", nn.Linear(2, 2)), "lm_head.weight"),
    "norm before the blocks": (
        lambda: with_part(make("gpt2"), "norm", nn.LayerNorm(2), first=True), "norm.weight"
    ),
    "part before the decoder's blocks": (
        lambda: with_part(make("t5"), "decoder.mixer", nn.Linear(2, 2), first=True), "decoder.mixer.weight"
    ),
    "module beside the model": (lambda: Wrapper(model=make("bert"), critic=nn.Linear(2, 2)), "critic.weight"),
    "two towers": (clip, "logit_scale"),
    "blocks in several lists": (
        lambda: transformers.XLMModel(transformers.XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2)),
        "layer_norm1.0.weight",
    ),
    "stages without blocks": (
        lambda: transformers.PoolFormerModel(
            transformers.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
        ), "lists of equal blocks",
    ),
    "no blocks": (lambda: Flat(transformers.BertConfig(**TEXT)), "Flat has no list of blocks"),
    "no transformers model": (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCERTAIN)
def test_what_cannot_be_placed_is_refused_by_name(case):
    build, named = UNCERTAIN[case]
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        parameter_depths(build())
