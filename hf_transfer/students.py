"""Students made from teachers: a smaller model out of some of a teacher's blocks, and which of its layers each learns
from."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_transfer.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LayerMap = Literal["uniform", "last"] | Mapping[int, int]
"""Which teacher layer each student layer learns from: a rule, or teacher depth by student depth."""


def student_from(teacher: PreTrainedModel, *, layers: int | Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's class with only these of its blocks, and all else as the teacher has it.

    Embeddings, final norm, pooler and head are copied along, and so are labels, generation settings, precision and
    device; nothing is shared with the teacher, which stays as it was. The student is an ordinary transformers model in
    evaluation mode, as ``from_pretrained`` returns it.

    Args:
        teacher: A transformers model with one line of blocks, or with one in its encoder and one in its decoder.
        layers: How many blocks to keep, or which, by depth as ``parameter_depths`` counts: 1 is the lowest, and an
            encoder's come before its decoder's. A number keeps the first and the last and spaces the others evenly
            between them, for the first fits the embeddings and the last one the head: 6 of 12 are 1, 3, 5, 8, 10 and
            12, as in DistilBERT (Sanh et al. 2019, section 3) and in "shrink and fine-tune" (Shleifer & Rush 2020).
            1 keeps the first. Of an encoder-decoder it keeps that many in each of the two; the whole encoder of 12
            with 3 of the decoder's 12 blocks is ``[*range(1, 13), 13, 19, 24]``. To drop the top of a model, which
            Sajjad et al. 2023 found best when fine-tuning follows without distillation, give ``range(1, n + 1)``.

    Raises:
        ConfigurationError: ``layers`` is empty, out of range, unordered or repeats a depth; the teacher is quantised,
            wears an adapter, has stages of different widths (Swin, ConvNeXt), or blocks whose kind its config gives by
            position in a way that a smaller model cannot repeat.

    Example:
        >>> student = student_from(AutoModelForSequenceClassification.from_pretrained("teacher"), layers=6)
        >>> student.save_pretrained("student")
    """
    from transformers import PreTrainedModel
    from transformers.initialization import no_init_weights

    if not isinstance(teacher, PreTrainedModel) or getattr(teacher, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            f"student_from: expected a transformers model without adapters, found {type(teacher).__name__}"
            f"{' with an adapter' if isinstance(teacher, PreTrainedModel) else ''}. Merge them first: "
            "peft's merge_and_unload()."
        )
    if getattr(teacher, "hf_quantizer", None) is not None:
        raise ConfigurationError("student_from: the teacher is quantised. Load it in full precision to copy from it.")
    if hasattr(teacher.config, "depths"):
        raise ConfigurationError(
            f"student_from: {type(teacher).__name__} has stages of {teacher.config.depths} blocks, and a block of "
            "one fits no other. Expected a model of equal blocks."
        )
    kept = _kept(layers, tower_sizes(teacher))
    config = _cut_config(teacher, kept)
    with no_init_weights():
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    _copy_weights(teacher, student, [depth for tower in kept for depth in tower])
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def layer_map(student_layers: int, teacher_layers: int, *, how: LayerMap = "uniform") -> dict[int, int]:
    """The teacher depth that each student depth learns from; 0 is the embeddings' output, n that of block n.

    Args:
        student_layers: M, the student's number of blocks.
        teacher_layers: N, the teacher's.
        how: ``"uniform"``: embeddings from embeddings, and depth m from ``g(m) = m * N / M``, rounded half up and at
            least 1 (Jiao et al. 2020, TinyBERT, the best of the strategies they compare). ``"last"``: the student's
            blocks from the teacher's M last. Or the map itself.

    Raises:
        ConfigurationError: A depth that is not there, an empty map, an unknown rule, or ``"last"`` for a student of
            more blocks than the teacher has.

    Example:
        >>> layer_map(4, 12)
        {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}
        >>> layer_map(3, 12, how="last")
        {1: 10, 2: 11, 3: 12}
    """
    if isinstance(how, Mapping):
        for role, named, most in (("student", how.keys(), student_layers), ("teacher", how.values(), teacher_layers)):
            if wrong := [depth for depth in named if depth not in range(most + 1)]:
                raise ConfigurationError(
                    f"layers: the {role} has depths 0 (embeddings) to {most}, found {wrong[0]!r}."
                )
        if not how:
            raise ConfigurationError("layers: the map is empty. Expected teacher depth by student depth.")
        return dict(how)
    depths = range(1, student_layers + 1)
    if how == "uniform":
        rounded = [(2 * m * teacher_layers + student_layers) // (2 * student_layers) for m in depths]
        return {0: 0} | {m: max(1, depth) for m, depth in zip(depths, rounded, strict=True)}
    if how == "last":
        if student_layers > teacher_layers:
            raise ConfigurationError(
                f"layers: 'last' needs a teacher of at least the student's {student_layers} blocks, found "
                f"{teacher_layers}. Use 'uniform'."
            )
        return {m: m + teacher_layers - student_layers for m in depths}
    raise ConfigurationError(
        f"layers: expected a rule or teacher depth by student depth, found {how!r}. "
        f"{nearest(how, ['uniform', 'last'])}"
    )


def tower_sizes(model: nn.Module) -> list[int]:
    """The number of blocks in the model's one line, or in its encoder and its decoder, or in each of its stages.

    Raises:
        ConfigurationError: The model has no line of blocks.
    """
    from hf_transfer.depth import block_names

    return [len(list(names)) for _, names in groupby(block_names(model), key=lambda name: name.rpartition(".")[0])]


def _kept(layers: int | Sequence[int], sizes: list[int]) -> list[list[int]]:
    """The depths that stay, tower by tower."""
    total = sum(sizes)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    if isinstance(layers, int):
        if not 1 <= layers <= min(sizes):
            raise ConfigurationError(
                f"layers: found {layers}, expected 1 to {min(sizes)}, the teacher's number of blocks"
                f"{' in its smaller half' if len(sizes) > 1 else ''}."
            )
        gaps = max(1, layers - 1)
        return [
            [end - size + 1 + (2 * index * (size - 1) + gaps) // (2 * gaps) for index in range(layers)]
            for end, size in zip(ends, sizes, strict=True)
        ]
    depths = list(layers)
    if wrong := [depth for depth in depths if depth not in range(1, total + 1)]:
        raise ConfigurationError(
            f"layers: the teacher's blocks are at depths 1 (lowest) to {total}, found {wrong[0]!r}."
        )
    if depths != (ordered := sorted(set(depths))):
        raise ConfigurationError(
            f"layers: expected depths from the lowest up, each once, found {depths}. Did you mean {ordered}?"
        )
    kept = [[depth for depth in depths if end - size < depth <= end] for end, size in zip(ends, sizes, strict=True)]
    if not all(kept):
        where = f"blocks 1 to {total}" if len(sizes) == 1 else f"both blocks 1 to {ends[0]} and those above"
        raise ConfigurationError(f"layers: found {depths}, expected at least one of {where}.")
    return kept


def _cut_config(teacher: PreTrainedModel, kept: list[list[int]]) -> PreTrainedConfig:
    """The config of a model with only the ``kept`` depths of each tower.

    How a config calls its number of blocks is found by trying: the setting is the one that changes a model's blocks.
    """
    config = copy.deepcopy(teacher.config)
    sizes = wanted = tower_sizes(teacher)
    for tower, depths in enumerate(kept):
        if len(depths) == sizes[tower]:
            continue
        wanted = [len(depths) if index == tower else size for index, size in enumerate(wanted)]
        positions = [depth - 1 - sum(sizes[:tower]) for depth in depths]
        for path, name in _settings(config, sizes[tower]):
            candidate = copy.deepcopy(config)
            part = reduce(getattr, path, candidate)
            for other, value in vars(part).items():
                if "layer" in other and isinstance(value, (list, tuple)) and len(value) == sizes[tower]:
                    setattr(part, other, type(value)(value[position] for position in positions))
            setattr(part, name, len(depths))
            if tower_sizes(_on_meta(teacher, candidate)) == wanted:
                config = candidate
                break
        else:
            raise ConfigurationError(
                f"student_from: no setting of {type(config).__name__} is the number of blocks ({sizes[tower]}): this "
                "kind of model has no smaller one of the same class."
            )
    return config


def _settings(config: PreTrainedConfig, value: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path to the part of ``config`` and name there of every setting with "layer" in its name and this ``value``."""
    from transformers import PreTrainedConfig

    for name, found in vars(config).items():
        if "layer" in name and found == value and isinstance(found, int):
            yield (), name
        elif isinstance(found, PreTrainedConfig):
            yield from (((name, *path), inner) for path, inner in _settings(found, value))


def _on_meta(teacher: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        return type(teacher)._from_config(copy.deepcopy(config))


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, depths: list[int]) -> None:
    """Give ``student`` copies of the teacher's tensors; its blocks get those at ``depths``.

    What only a model's first block holds (T5's relative positions) comes from the teacher's first block.
    """
    from hf_transfer.depth import block_names

    blocks = block_names(teacher)
    source_of = dict(zip(block_names(student), (blocks[depth - 1] for depth in depths), strict=True))
    given = teacher.state_dict()
    sources = {}
    for name in student.state_dict():
        block = next((block for block in source_of if name.startswith(f"{block}.")), "")
        source = source_of.get(block, "") + name.removeprefix(block)
        sources[name] = source if source in given else name
    _refuse_other_kinds(_on_meta(teacher, teacher.config), student, source_of, sources)
    try:
        copies = {name: given[source].to(teacher.device, copy=True) for name, source in sources.items()}
        student.to(teacher.device).load_state_dict(copies, assign=True)  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise ConfigurationError(f"student_from: the teacher's weights do not fit a smaller model: {error}") from error
    student.tie_weights()


def _refuse_other_kinds(
    whole: PreTrainedModel, student: PreTrainedModel, source_of: dict[str, str], sources: dict[str, str]
) -> None:
    """A config may give by position what blocks are (experts or none, a scale): elsewhere a copy is another function.

    Where a first block takes what only first blocks hold, it may differ from its source by having it.
    """
    for block, source in source_of.items():
        shift = int(source.rpartition(".")[2]) - int(block.rpartition(".")[2])
        first = f"{block}." if shift and block.endswith(".0") else None
        extra = [name for name in sources if first and name.startswith(first) and sources[name] == name]
        found = _traits(student.get_submodule(block))
        expected = _traits(whole.get_submodule(source))
        for module, trait in {**expected, **found}:
            has, had = found.get((module, trait)), expected.get((module, trait))
            position = type(has) is type(had) is int and had - has == shift
            extended = (module, trait) in found and any(name.startswith(f"{block}.{module}.") for name in extra)
            if has != had and not position and not extended:
                raise ConfigurationError(
                    f"student_from: '{source}' of {type(whole).__name__} would become '{block}', another kind of "
                    f"block ('{trait}' of '{module or block}' is {has}, was {had}). Choose layers that keep the "
                    "order of kinds."
                )


def _traits(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Module and name there of all that decides what ``block`` computes, but for tensors and rates of dropout."""
    return {
        (name, trait): value
        for name, module in block.named_modules()
        for trait, value in {**vars(module), "class": type(module).__name__}.items()
        if isinstance(value, (bool, int, float, str)) and not re.search("^_|drop|^training$", trait)
    }
