"""The ``model:`` section of a recipe: which pretrained weights, and the model they make for a task."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_transfer.checkpoints import check_weight_files, local_folder, resolve
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.heads import add_mean_pooling
from hf_transfer.students import student_from
from hf_transfer.tasks import ProblemType, TaskName, find_task

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 4  # weights named in a message
_NEW_POOLER = "_new_pooler"
_MEDIA = {"image": ("PIL", "vision", "AutoImageProcessor"), "audio": ("soundfile", "audio", "AutoFeatureExtractor")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model, and the task it gets a head for.

    Args:
        name: A Hub id or a folder.
        task: What it is trained to do.
        revision: Branch, tag or commit of a Hub model.
        pretrained: If false, the same architecture with random weights: the control that shows what pretraining gives.
        dtype: Of the weights. Full precision by default, since half-precision weights lose small updates; bfloat16
            halves the memory of a base that stays frozen. "auto" is the checkpoint's.
        quantization: 8bit, 4bit (nf4), or arguments of `transformers.BitsAndBytesConfig`. Never touches the head.
        attn_implementation: eager, sdpa, flash_attention_2, ...; by default what transformers finds best.
        pooling: What a sequence classifier reads. By default what its class does, for the BERT family the first
            position; the "mean" of all tokens suits sentence encoders, which were trained on it (`add_mean_pooling`).
        layers: Keep only so many of its blocks, or those of these depths (1 is the lowest): a student made from a
            teacher (`student_from`). By default all.
        trust_remote_code: Run code from the model's own repository. Off: it may do anything.
    """

    section: ClassVar[str] = "model"
    """What a recipe calls it, and what messages name."""

    name: str
    task: TaskName = "sequence-classification"
    revision: str | None = None
    pretrained: bool = True
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    quantization: Literal["8bit", "4bit"] | dict[str, Any] | None = None
    attn_implementation: str | None = None
    pooling: Literal["mean"] | None = None
    layers: int | list[int] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        find_task(self.task)
        section = self.section
        if not self.name:
            raise ConfigurationError(f"{section}.name is empty: expected a Hub id or a folder.")
        if self.quantization is not None and not self.pretrained:
            raise ConfigurationError(
                f"{section}.quantization needs pretrained weights, but {section}.pretrained is false."
            )
        if self.pooling is not None and (self.task != "sequence-classification" or self.quantization is not None):
            raise ConfigurationError(
                f"{section}.pooling is for sequence-classification on a base that is not quantised."
            )
        if self.layers is not None and self.quantization is not None:
            raise ConfigurationError(f"{section}.layers: blocks are taken from a base that is not quantised.")

    @property
    def named(self) -> str:
        """How messages name it."""
        return f"{self.section}.name = '{self.name}'"


@dataclass(frozen=True)
class TeacherSpec(ModelSpec):
    """A model that teaches: it is taken as it was trained, with its own head and labels."""

    section: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [name for name in ("layers", "pooling") if getattr(self, name) is not None]
        if changed or not self.pretrained:
            raise ConfigurationError(
                f"teacher.{(*changed, 'pretrained')[0]}: a teacher is taken as it was trained. "
                "The student's is in the section 'model'."
            )


def load_tokenizer(spec: ModelSpec, *, base_dir: str | Path = ".") -> PreTrainedTokenizerBase:
    """The model's tokenizer, able to pad and aware of the model's longest input.

    A tokenizer without a padding token (most decoders) pads with its end-of-text token. One that adds no space before
    words is told to for token classification, whose words come one by one.

    Raises:
        ConfigurationError: There is no tokenizer, or nothing to pad with.
    """
    from transformers import AutoTokenizer

    location = resolve(spec.name, revision=spec.revision, base_dir=base_dir, section=spec.section)
    config = _load_config(spec, location)
    options = {"add_prefix_space": True} if spec.task == "token-classification" else {}
    with _one_line_errors(spec, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes up an empty one where files are missing
        raise ConfigurationError(f"{spec.named}: it has no tokenizer.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(
                f"{spec.named}: its tokenizer has no padding and no end-of-text token to pad with."
            )
        tokenizer.pad_token = tokenizer.eos_token
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and longest > 0:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def load_processor(spec: ModelSpec, *, base_dir: str | Path = ".") -> Any:
    """What makes the model's inputs: its tokenizer (see `load_tokenizer`), image processor or feature extractor.

    Raises:
        ConfigurationError: There is none, or a package that it needs is not installed.
    """
    reads = find_task(spec.task).reads
    if reads == "text":
        return load_tokenizer(spec, base_dir=base_dir)
    import transformers

    package, extra, cls = _MEDIA[reads]
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"{spec.section}.task = '{spec.task}': it needs {package}: pip install 'hf-transfer-learning[{extra}]'"
        )
    location = resolve(spec.name, revision=spec.revision, base_dir=base_dir, section=spec.section)
    _load_config(spec, location)
    with _one_line_errors(spec, f"it has no {cls.removeprefix('Auto')} that can be loaded"):
        return getattr(transformers, cls).from_pretrained(
            location, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def load_model(
    spec: ModelSpec,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    label_names: Sequence[str] = (),
    problem_type: ProblemType | None = None,
    seed: int = 0,
    base_dir: str | Path = ".",
) -> PreTrainedModel:
    """The model for ``spec.task`` with pretrained weights and, where the task needs one, a new head.

    Args:
        spec: The ``model:`` section.
        tokenizer: What `load_tokenizer` gave; the model then ignores the same padding.
        label_names: In the order of their ids; none for regression (one output) and language modelling.
        problem_type: Of sequence classification; decides the loss.
        seed: Of all that starts at random. The caller's random state is left as it was.
        base_dir: What a relative folder starts from.

    Raises:
        ConfigurationError: The model cannot be found or read, a weight below the head is missing or has another shape,
            or the options do not go together.
    """
    import torch
    import transformers

    task = find_task(spec.task)
    location = resolve(spec.name, revision=spec.revision, base_dir=base_dir, section=spec.section)
    config = _load_config(spec, location)
    _check_compatible(spec, config, tokenizer)
    if task.new_head:
        config.num_labels = max(len(label_names), 1)
        config.problem_type = problem_type
        if label_names:
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: position for position, name in enumerate(label_names)}

    auto_class = getattr(transformers, task.auto_class)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.dtype != "auto":
        options["dtype"] = getattr(torch, spec.dtype)
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _one_line_errors(spec, f"it cannot be loaded for {spec.task}"), torch.random.fork_rng(device):
        torch.manual_seed(seed)
        pooler = None
        if not spec.pretrained:
            model = auto_class.from_config(config, **options)
        else:
            if Path(location).is_dir():
                check_weight_files(Path(location), section=spec.section)
            if spec.quantization is not None:
                make = partial(auto_class.from_config, trust_remote_code=spec.trust_remote_code)
                options["quantization_config"] = _quantization(spec, make, config)
            with _without_load_report():
                model, loading = auto_class.from_pretrained(
                    location,
                    config=config,
                    revision=spec.revision,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # a head of another size gives way to a new one; a base is refused
                    output_loading_info=True,
                    **options,
                )
            pooler = _check_loaded(spec, model, loading)

    if spec.layers is not None:
        model = student_from(model, layers=spec.layers)
    if pooler:
        logger.warning("%s has no pooler, so %s starts at random.", spec.name, pooler)
        setattr(model, _NEW_POOLER, pooler)
    if spec.pooling == "mean":
        add_mean_pooling(model)
    _keep_four_bits_in_autograd(model)
    if tokenizer is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if not local_folder(spec.name, base_dir=base_dir).is_dir():
        model.name_or_path = model.config.name_or_path = spec.name  # what adapters record: not a path of this machine
    return model


def load_trained(spec: ModelSpec, *, base_dir: str | Path = ".") -> PreTrainedModel:
    """A model as it was trained, with its own head and labels: a teacher.

    Args:
        spec: The ``model:`` section. Which class it is, the checkpoint says.
        base_dir: What a relative folder starts from.

    Raises:
        ConfigurationError: The model cannot be found or read, names no class of transformers, or lacks a weight.
    """
    import torch
    import transformers

    location = resolve(spec.name, revision=spec.revision, base_dir=base_dir, section=spec.section)
    config = _load_config(spec, location)
    kind = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, kind, None) if kind else None
    if cls is None:
        raise ConfigurationError(f"{spec.named}: its architecture is {kind}, no class of transformers.")
    options: dict[str, Any] = {} if spec.dtype == "auto" else {"dtype": getattr(torch, spec.dtype)}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        options["quantization_config"] = _quantization(spec, cls, config)
    if Path(location).is_dir():
        check_weight_files(Path(location), section=spec.section)
    with _one_line_errors(spec, "it cannot be loaded"), _without_load_report():
        model, loading = cls.from_pretrained(
            location,
            config=config,
            revision=spec.revision,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_whole(spec, _without_values(loading))
    _keep_four_bits_in_autograd(model)
    return model.eval()


def new_modules(model: PreTrainedModel) -> list[str]:
    """The modules of a model from `load_model` that hold no pretrained weights: its head, and its pooler where the
    checkpoint had none. An adapter must train and keep them."""
    from hf_transfer.depth import head_names

    pooler = getattr(model, _NEW_POOLER, None)
    return [*head_names(model), *([pooler] if pooler else [])]


@contextmanager
def _one_line_errors(spec: ModelSpec, what: str) -> Iterator[None]:
    """Give what transformers raises the model's name and one line."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{spec.named}: {what}: {shorten(str(error), 300)}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the table of missing weights: that the head is new is expected, any other is an error of ours."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def _load_config(spec: ModelSpec, location: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    folder = Path(location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = " It is an adapter: name its base." if (folder / "adapter_config.json").is_file() else ""
        raise ConfigurationError(f"{spec.named}: '{folder}' has no config.json.{hint}")
    with _one_line_errors(spec, "its config.json cannot be used"):
        return AutoConfig.from_pretrained(location, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def _check_compatible(spec: ModelSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if spec.task == "causal-lm" and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder:
        if getattr(config, "is_decoder", None) is False:
            raise ConfigurationError(
                f"{spec.named}: a {config.model_type} model sees the words it would have to predict. "
                "causal-lm needs a decoder, such as Llama, Qwen or GPT-2."
            )
    embeddings = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and embeddings is not None and len(tokenizer) > embeddings:
        raise ConfigurationError(
            f"{spec.named}: {len(tokenizer)} tokens in the tokenizer, but {embeddings} embeddings."
        )


def _check_loaded(spec: ModelSpec, model: PreTrainedModel, loading: Mapping[str, Any]) -> str | None:
    """Refuse weights that are random where pretrained ones were asked for: any but a new head's.

    A pooler may be new too, and its name is returned: only the head reads it, and checkpoints of masked language
    models have none.
    """
    from hf_transfer.depth import head_names

    new = _without_values(loading)
    heads = head_names(model) if find_task(spec.task).new_head else []
    base = {name: what for name, what in new.items() if not any(name.startswith(f"{head}.") for head in heads)}
    pooler = sorted(name for name in base if heads and ".pooler." in name and base[name] == "missing")
    _check_whole(spec, {name: what for name, what in base.items() if name not in pooler})
    if not pooler:
        return None
    if spec.quantization is not None:
        raise ConfigurationError(
            f"{spec.named}: the checkpoint has no pooler, and a new one cannot be trained once it is "
            f"quantised. Take a checkpoint that has one, or leave out {spec.section}.quantization."
        )
    return pooler[0][: pooler[0].index(".pooler.")] + ".pooler"


def _without_values(loading: Mapping[str, Any]) -> dict[str, str]:
    """The weights that the checkpoint did not fill, and why."""
    new = dict.fromkeys(loading["missing_keys"], "missing")
    for name, found, expected in loading["mismatched_keys"]:
        new[name] = f"{list(found)} instead of {list(expected)}"
    return new


def _check_whole(spec: ModelSpec, new: Mapping[str, str]) -> None:
    if new:
        named = sorted(f"{name} ({what})" for name, what in new.items())
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        raise ConfigurationError(
            f"{spec.named}: the checkpoint is not whole, or not of this architecture. Without "
            f"pretrained values: {', '.join(named[:SHOWN])}{more}."
        )


def _keep_four_bits_in_autograd(model: PreTrainedModel) -> None:
    """Where the processor has bfloat16 units, an evaluation would repack 4-bit weights out of autograd's reach."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _quantization(
    spec: ModelSpec, make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig
) -> BitsAndBytesConfig:
    """What bitsandbytes is to do, with the head left out: gradients need floating-point weights there."""
    import torch
    from transformers import BitsAndBytesConfig

    from hf_transfer.depth import head_names

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"{spec.section}.quantization: bitsandbytes is not installed: "
            "pip install hf-transfer-learning[quantization]"
        )
    if isinstance(spec.quantization, dict):
        options = dict(spec.quantization)
    elif spec.quantization == "8bit":
        options = {"load_in_8bit": True}
    else:
        compute = {} if spec.dtype == "auto" else {"bnb_4bit_compute_dtype": spec.dtype}
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **compute}
    valid = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in options:
        if name not in valid:
            raise ConfigurationError(
                f"{spec.section}.quantization: BitsAndBytesConfig has no '{name}'. {nearest(name, valid)}"
            )
    if not (options.get("load_in_8bit") or options.get("load_in_4bit")):
        raise ConfigurationError(f"{spec.section}.quantization: expected load_in_8bit: true or load_in_4bit: true.")
    if find_task(spec.task).new_head:
        with torch.device("meta"):
            heads = head_names(make(config))
        options["llm_int8_skip_modules"] = [*heads, *options.get("llm_int8_skip_modules", [])]
    return BitsAndBytesConfig(**options)
