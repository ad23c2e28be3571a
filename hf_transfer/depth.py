"""Where each parameter of a transformers model sits between the input and the head."""

from __future__ import annotations

import re
from typing import TypeGuard

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from transformers import MODEL_MAPPING, PreTrainedModel

from hf_transfer.errors import ConfigurationError
from hf_transfer.losses import transformer_in

# Beside the blocks, registration order tells most: what comes before them feeds block 1, a norm or pooler after them
# reads the last one. These patterns, searched in "ClassOfTheParent.name", know where order misleads or does not do.
_SHARED_TABLE = re.compile(r"\.(shared$|rel(ative)?_)|DebertaV2Encoder\.LayerNorm$")
_FEEDS_BLOCK_1 = re.compile(
    r"\.\w*(emb|token)|(Wav2Vec2|Hubert|WavLM|UniSpeech|UniSpeechSat|Data2VecAudio)Encoder\.layer_norm$"
)
_FOLLOWS_BLOCK_1 = re.compile(r"DebertaV2Encoder\.conv$")
_READS_LAST_BLOCK = re.compile(
    r"\.(project_out|final_layer_norm|pooler)$|(StableLayerNorm|Wav2Vec2ConformerEncoder)\.layer_norm$"
)
_UNCERTAIN_IF_BEFORE = re.compile(r"\.(layer_?)?norm$", re.IGNORECASE)
_LEAVES_STAGE_IF_AFTER = re.compile(r"\.downsampl")
_READS_LAST_BLOCK_IF_AFTER = re.compile(r"\.\w*(norm|ln_|pool|conv_1x1|top_|adapter)", re.IGNORECASE)


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter: 0 embeddings, 1..n blocks bottom to top, n + 1 head.

    Read from names and module structure alone, so precision and quantisation do not matter. Adapter weights sit where
    the layer they adapt sits. A pretrained part above the last block (final norm, pooler) belongs to that block; what
    all blocks share (relative positions, virtual tokens) is at 0; a layer between two stages belongs to the block it
    feeds. An encoder's blocks come before its decoder's. A tied parameter sits where its first name says.

    Args:
        model: A transformers model, bare or inside a PEFT model.

    Returns:
        Depth by name, with exactly the names of ``model.named_parameters()``, in that order.

    Raises:
        ConfigurationError: The model has no line of blocks, or a parameter has no certain place along it.
    """
    anatomy = _Anatomy(model)
    return {name: anatomy.depth(name) for name, _ in model.named_parameters()}


def original_name(name: str) -> str:
    """What a parameter was called before FSDP's activation checkpointing wrapped the blocks."""
    return name.replace(_CHECKPOINT_PREFIX, "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their original names."""
    return {original_name(name): parameter for name, parameter in model.named_parameters()}


def block_names(model: nn.Module) -> list[str]:
    """The names of the n blocks, bottom up: depth d is at index d - 1.

    Raises:
        ConfigurationError: The model has no line of blocks.
    """
    return _Anatomy(model).blocks


def embedding_names(model: nn.Module) -> list[str]:
    """The modules that turn the input into block 1's hidden states, in execution order, e.g. ``["bert.embeddings"]``.

    With their outputs known, nothing below block 1 needs to run. A dropout between embeddings and block 1 is one of
    them, because it decides whether that input is fixed; tables that only the blocks' attention reads are not.

    Raises:
        ConfigurationError: The model has no line of blocks.
    """
    return _Anatomy(model).embeddings


def head_names(model: nn.Module) -> list[str]:
    """The modules that hold the parameters at depth n + 1, e.g. ``["classifier"]``.

    Empty for a bare model, and where the head's only weight is tied to the embeddings.

    Raises:
        ConfigurationError: The model has no line of blocks.
    """
    anatomy = _Anatomy(model)
    own = [name for name, _ in model.named_parameters()]
    return [head for head in anatomy.heads if any(name.startswith(f"{head}.") for name in own)]


class _Anatomy:
    """The parts of a model (modules or parameters that lie wholly at one depth) and where each is."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._core = transformer_in(model)
        base = self._core if _is_bare(self._core) else self._core.base_model
        self._staged = hasattr(self._core.config, "depths")
        self._stacks = _stacks_of_blocks(base, staged=self._staged)
        self._trunk = {module for module in base.modules() if not self._stacks.isdisjoint(module.modules())}
        self._depths = {"prompt_encoder": 0}  # PEFT's virtual tokens, beside the transformers model
        self._feeding_block_1: set[nn.Module] = set()
        self.blocks: list[str] = []
        self._place_under(base)
        self.embeddings = [name for module, name in self._names.items() if module in self._feeding_block_1]
        self.heads = [self._full_name(self._core, part) for part in _head_parts(self._core, base)]
        self._depths |= dict.fromkeys(self.heads, len(self.blocks) + 1)

    def depth(self, parameter: str) -> int:
        """The depth of the part that is ``parameter`` or holds it."""
        part = parameter
        while part and part not in self._depths:
            part = part.rpartition(".")[0]
        if not part:
            raise ConfigurationError(
                f"Cannot tell the depth of parameter '{parameter}' of {type(self._core).__name__}. Expected: part of "
                f"a block ('{self.blocks[0]}' to '{self.blocks[-1]}'), of an embedding before the blocks, of a norm "
                "or pooler after them, or of a head outside the base model."
            )
        return self._depths[part]

    def _place_under(self, parent: nn.Module) -> None:
        """Number the blocks under ``parent``, bottom up, and place what it holds beside them."""
        if parent in self._stacks:
            for block in parent.children():
                self.blocks.append(self._names[block])
                self._depths[self._names[block]] = len(self.blocks)
            return
        first = len(self.blocks) + 1
        for child in parent.children():
            if child in self._trunk:
                self._place_under(child)
        before = True
        for name, part in _parts(parent).items():
            if part in self._trunk:
                before = False
                continue
            label = f"{type(parent).__name__}.{name}"
            depth = self._depth_beside_blocks(label, part, before=before, first=first)
            if depth is not None:
                self._depths[self._full_name(parent, name)] = depth
            if depth == 0 and first == 1 and _transforms(part) and not _SHARED_TABLE.search(label):
                self._feeding_block_1.add(part)

    def _depth_beside_blocks(
        self, label: str, part: nn.Module | nn.Parameter, *, before: bool, first: int
    ) -> int | None:
        """The depth of a part registered before or after the blocks ``first`` to latest; None if uncertain."""
        latest = len(self.blocks)
        if self._staged and before:
            return first if first > 1 else 0
        if _SHARED_TABLE.search(label) or _FEEDS_BLOCK_1.search(label):
            return 0
        if _FOLLOWS_BLOCK_1.search(label):
            return first
        if _READS_LAST_BLOCK.search(label):
            return latest
        if isinstance(part, (nn.ModuleList, PreTrainedModel)):  # another line of blocks
            return None
        if before:
            return 0 if first == 1 and not _UNCERTAIN_IF_BEFORE.search(label) else None
        if _LEAVES_STAGE_IF_AFTER.search(label):
            return latest + 1
        return latest if _READS_LAST_BLOCK_IF_AFTER.search(label) else None

    def _full_name(self, parent: nn.Module, name: str) -> str:
        return f"{self._names[parent]}.{name}".lstrip(".")


def _is_bare(core: PreTrainedModel) -> bool:
    """Whether AutoModel makes this class, whose base model prefix may yet name a part of it."""
    return isinstance(core, MODEL_MAPPING.get(type(core.config), ()))  # type: ignore[arg-type]


def _parts(parent: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    return {**dict(parent.named_children()), **dict(parent.named_parameters(recurse=False))}


def _head_parts(core: PreTrainedModel, base: nn.Module) -> list[str]:
    """What ``core`` adds to its base, or to its towers where it is its own base, as T5ForConditionalGeneration is."""
    parts = _parts(core)
    if base is not core:
        return [name for name, part in parts.items() if part is not base]
    towers = [index for index, part in enumerate(parts.values()) if isinstance(part, PreTrainedModel)]
    return list(parts)[towers[-1] + 1 :] if towers and "For" in type(core).__name__ else []


def _stacks_of_blocks(base: nn.Module, *, staged: bool) -> set[nn.Module]:
    """The lists that hold the blocks: one, one in the encoder and one in the decoder, or one per stage."""
    children = dict(base.named_children())
    towers = [children["encoder"], children["decoder"]] if {"encoder", "decoder"} <= children.keys() else [base]
    stacks = [_list_of_largest_items(tower) for tower in towers]
    return {_list_of_one_class(stage) for stack in stacks for stage in stack} if staged else set(stacks)


def _list_of_largest_items(tower: nn.Module) -> nn.ModuleList:
    """The blocks or stages under ``tower``: experts, convolutions and whatever else is in lists is made of less."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigurationError(f"{type(tower).__name__} has no list of blocks: it has no depths.")
    return max(lists, key=lambda items: max(sum(1 for _ in item.modules()) for item in items))


def _list_of_one_class(stage: nn.Module) -> nn.Module:
    """The blocks of a hierarchical net's stage (downsampling, where that is a list too, mixes classes)."""
    lists = [child for child in stage.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    uniform = [child for child in lists if len({type(item) for item in child}) == 1]
    if len(uniform) != 1:
        raise ConfigurationError(f"{type(stage).__name__} holds {len(uniform)} lists of equal blocks, expected 1.")
    return uniform[0]


def _transforms(part: nn.Module | nn.Parameter) -> TypeGuard[nn.Module]:
    """Whether ``part`` is a module that changes hidden states by weights or by chance."""
    return isinstance(part, nn.Dropout) or (isinstance(part, nn.Module) and any(True for _ in part.parameters()))
