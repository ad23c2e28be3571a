"""A student computes what its teacher computes with the other blocks left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from hf_transfer.depth import block_names
from hf_transfer.errors import ConfigurationError
from hf_transfer.students import layer_map, student_from
from tests.test_depth import FAMILIES, GROUPED, TEXT, make, random_inputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

TASKS = {
    "bert": "SequenceClassification", "distilbert": "SequenceClassification", "roberta": "MaskedLM",
    "deberta-v2": "TokenClassification", "modernbert": "SequenceClassification", "llama": "CausalLM",
    "qwen3": "CausalLM", "gemma3": "CausalLM", "gpt2": "CausalLM",
    "opt": "CausalLM", "phi": "CausalLM", "t5": "Seq2SeqLM", "bart": "Seq2SeqLM", "vit": "ImageClassification",
    "wav2vec2": "CTC", "wav2vec2-stable": "AudioClassification", "whisper": "SpeechSeq2Seq",
}  # fmt: skip
ENCODER_DECODERS = ["t5", "bart", "whisper"]  # of 3 and 2 blocks
FIRST_BLOCK_IS_ANOTHER = ["modernbert", "deberta-v2"]  # it lacks a norm; a convolution follows it
SUBSETS = [
    (family, layers)
    for family in TASKS
    for layers in ([[1, 3, 5], [2, 3, 5]] if family in ENCODER_DECODERS else [[1, 3], [2, 3]])
    if layers[0] == 1 or family not in FIRST_BLOCK_IS_ANOTHER
]
GENERATING = ["llama", "qwen3", "gemma3", "gpt2", "opt", "t5", "bart", "whisper"]


def logits(model: transformers.PreTrainedModel, *, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_inputs(model, seed))[0]


def without_other_blocks(teacher: transformers.PreTrainedModel, layers: list[int]) -> torch.Tensor:
    """The teacher's logits where every block that is not kept hands on its input as its output."""

    def pass_by(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    left_out = [name for depth, name in enumerate(block_names(teacher), 1) if depth not in layers]
    hooks = [teacher.get_submodule(name).register_forward_hook(pass_by, with_kwargs=True) for name in left_out]
    found = logits(teacher)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", TASKS)
def test_all_blocks_make_the_teacher_again(family):
    teacher = make(family, TASKS[family])
    student = student_from(teacher, layers=range(1, FAMILIES[family].blocks + 1))
    assert type(student) is type(teacher)
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize(("family", "layers"), SUBSETS)
def test_some_blocks_make_the_teacher_without_the_others(family, layers):
    teacher = make(family, TASKS[family])
    student = student_from(teacher, layers=layers)
    assert len(block_names(student)) == len(layers)
    assert torch.equal(logits(student), without_other_blocks(teacher, layers))
    assert not torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("family", GENERATING)
def test_generates_with_its_cache_what_it_generates_without(family):
    teacher = make(family, TASKS[family])
    student = student_from(teacher, layers=[2, 3, 5] if family in ENCODER_DECODERS else [2, 3])
    inputs = random_inputs(student, seed=0)
    prompt = {student.main_input_name: inputs[student.main_input_name]}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = [student.generate(**prompt, **settings, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "whisper", "wav2vec2"])
def test_is_saved_and_loaded_as_any_model(family, tmp_path):
    teacher = make(family, TASKS[family])
    student = student_from(teacher, layers=1)
    student.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    expected = student.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(student))  # elsewhere in memory: other kernels


def test_keeps_what_is_not_a_block_and_shares_nothing():
    teacher = make("gpt2", "CausalLM").to(torch.bfloat16).requires_grad_(False)
    teacher.generation_config.max_new_tokens = 11
    teacher.config.id2label = {0: "no", 1: "yes"}
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_from(teacher, layers=2)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.lm_head.weight is student.transformer.wte.weight
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert (student.generation_config.max_new_tokens, student.config.id2label) == (11, {0: "no", 1: "yes"})
    for parameter in student.parameters():
        parameter.data.zero_()
    student.config.id2label[0] = "never"
    student.generation_config.max_new_tokens = 12
    assert teacher.config.id2label[0] == "no"
    assert teacher.generation_config.max_new_tokens == 11
    assert teacher.config.n_layer == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_each_tensor_keeps_its_precision():
    teacher = make("bert", "SequenceClassification").to(torch.bfloat16)
    teacher.classifier.float()
    student = student_from(teacher, layers=1)
    assert (student.classifier.weight.dtype, student.bert.pooler.dense.weight.dtype) == (torch.float32, torch.bfloat16)


def test_settings_by_layer_follow_their_layers():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    teacher = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**GROUPED, layer_types=kinds, sliding_window=2)
    ).eval()
    student = student_from(teacher, layers=[2, 3])
    assert student.config.layer_types == kinds[1:]
    assert teacher.config.layer_types == kinds
    assert torch.equal(logits(student), without_other_blocks(teacher, [2, 3]))


def test_a_language_model_inside_another_config_is_found():
    torch.manual_seed(0)
    text = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    image = transformers.ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=3, image_size=32, patch_size=16
    )
    teacher = transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    ).eval()
    student = student_from(teacher, layers=[1, 2, 3, 5])
    assert (student.config.encoder.num_hidden_layers, student.config.decoder.num_hidden_layers) == (3, 1)
    assert torch.equal(logits(student), without_other_blocks(teacher, [1, 2, 3, 5]))


@pytest.mark.parametrize(
    ("blocks", "count", "expected"),
    [
        (12, 6, [1, 3, 5, 8, 10, 12]),  # DistilBERT's [0, 2, 4, 7, 9, 11]
        (12, 3, [1, 7, 12]),  # Shleifer & Rush's [0, 6, 11]
        (12, 1, [1]),
        (12, 2, [1, 12]),
        (5, 5, [1, 2, 3, 4, 5]),
    ],
)
def test_a_number_keeps_the_ends_and_spaces_the_rest(blocks, count, expected):
    torch.manual_seed(0)
    config = {**TEXT, "num_hidden_layers": blocks}
    teacher = transformers.BertModel(transformers.BertConfig(**config))
    student = student_from(teacher, layers=count)
    for name, depth in zip(block_names(student), expected, strict=True):
        ours, theirs = student.get_submodule(name), teacher.get_submodule(block_names(teacher)[depth - 1])
        assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight)


def test_a_number_counts_in_each_half_of_an_encoder_decoder():
    student = student_from(make("bart", "Seq2SeqLM"), layers=2)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 2)


def by_position() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32, scale_attn_by_inverse_layer_idx=True
    )
    return transformers.GPT2LMHeadModel(config)


def with_one_dense_block() -> transformers.PreTrainedModel:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**GROUPED, **experts))


def with_adapter() -> transformers.PreTrainedModel:
    model = make("bert")
    model.add_adapter(LoraConfig(target_modules=["query"]))
    return model


REFUSED = {
    "none": (lambda: make("bert"), [], "at least one of blocks 1 to 3"),
    "zero": (lambda: make("bert"), 0, "found 0, expected 1 to 3"),
    "too many": (lambda: make("bert"), 4, "found 4, expected 1 to 3"),
    "more than the smaller half": (lambda: make("bart"), 3, "found 3, expected 1 to 2.* in its smaller half"),
    "embeddings": (lambda: make("bert"), [0, 1], r"depths 1 \(lowest\) to 3, found 0"),
    "above": (lambda: make("bert"), [1, 4], "found 4"),
    "repeated": (lambda: make("bert"), [1, 1, 2], r"each once, found \[1, 1, 2\]. Did you mean \[1, 2\]"),
    "unordered": (lambda: make("bert"), [3, 1], r"Did you mean \[1, 3\]"),
    "no decoder": (lambda: make("bart"), [1, 2], "at least one of both blocks 1 to 3 and those above"),
    "stages": (lambda: make("swin"), 1, r"SwinModel has stages of \[1, 2\] blocks"),
    "no setting": (lambda: make("mobilenet-v2"), 3, "no setting of MobileNetV2Config is the number of blocks"),
    "peft": (lambda: get_peft_model(make("bert"), LoraConfig(target_modules=["query"])), 1, "found PeftModel.*merge"),
    "adapter": (with_adapter, 1, "found BertModel with an adapter"),
    "scale by position": (by_position, [2, 3], "'transformer.h.1' of GPT2LMHeadModel would become 'transformer.h.0'"),
    "experts by position": (with_one_dense_block, [2, 3], "'model.layers.1' .*another kind of block"),
    "norm by position": (lambda: make("modernbert"), [2, 3], "another kind of block"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused(case):
    build, layers, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        student_from(build(), layers=layers)


def test_kinds_that_stay_in_order_are_kept():
    torch.manual_seed(0)
    teacher = with_one_dense_block().eval()
    assert torch.equal(logits(student_from(teacher, layers=[1, 2])), without_other_blocks(teacher, [1, 2]))
    teacher = by_position().eval()
    assert torch.equal(logits(student_from(teacher, layers=[1, 2])), without_other_blocks(teacher, [1, 2]))


def test_a_quantised_teacher_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    make("llama", "CausalLM").save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    with pytest.raises(ConfigurationError, match="the teacher is quantised"):
        student_from(teacher, layers=1)


@pytest.mark.parametrize(
    ("student", "teacher", "how", "expected"),
    [
        (4, 12, "uniform", {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}),  # TinyBERT's four layers
        (5, 6, "uniform", {0: 0, 1: 1, 2: 2, 3: 4, 4: 5, 5: 6}),
        (3, 3, "uniform", {0: 0, 1: 1, 2: 2, 3: 3}),
        (4, 1, "uniform", {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}),
        (2, 12, "last", {1: 11, 2: 12}),
        (2, 2, "last", {1: 1, 2: 2}),
        (2, 12, {2: 12, 0: 0}, {2: 12, 0: 0}),
    ],
)
def test_layer_map(student, teacher, how, expected):
    assert layer_map(student, teacher, how=how) == expected


@pytest.mark.parametrize("teacher", [1, 7, 12, 24])
def test_uniform_is_the_nearest_whole_depth_in_order(teacher):
    for student in range(1, teacher + 1):
        found = layer_map(student, teacher)
        assert list(found) == list(range(student + 1))
        assert all(abs(found[m] - m * teacher / student) <= 0.5 for m in found)
        assert len(set(found.values())) == student + 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unifrom", "found 'unifrom'. Did you mean 'uniform'"),
        ("last", "'last' needs a teacher of at least the student's 4 blocks, found 3"),
        ({}, "the map is empty"),
        ({5: 1}, r"the student has depths 0 \(embeddings\) to 4, found 5"),
        ({1: 4}, r"the teacher has depths 0 \(embeddings\) to 3, found 4"),
        ({1: -1}, "found -1"),
    ],
)
def test_layers_that_cannot_be_mapped_are_refused(how, message):
    with pytest.raises(ConfigurationError, match=message):
        layer_map(4, 3, how=how)


def test_the_teacher_stays_usable():
    teacher = make("qwen3", "CausalLM").train()
    expected = copy.deepcopy(teacher)
    student_from(teacher, layers=1)
    assert teacher.training
    assert teacher.config.to_dict() == expected.config.to_dict()
    assert torch.equal(logits(teacher), logits(expected))
