"""Run the frozen part of a model once, keep what crosses the cut on disk, and train what lies above it from there."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import find_labels

from hf_transfer.activations import Activations, ActivationWriter, adapter_settings, fingerprint, tensors_digest
from hf_transfer.batches import EXAMPLE_INDEX, PROBE_SIZE, Batches, Collator
from hf_transfer.cuts import CutModel, Replay, Tap, evaluating, skipping_zero_layers
from hf_transfer.depth import parameter_depths
from hf_transfer.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Pooling = Literal["head", "mean", "first", "last"]
Precision = Literal["auto", "bfloat16", "float16", "float32"]

# What a configuration holds that the base does not compute with.
_BESIDE_THE_BASE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "use_cache",
}


def extract_features(
    model: nn.Module,
    dataset: Dataset,
    *,
    data_collator: Collator,
    cache_dir: str | Path,
    pooling: Pooling = "head",
    dtype: Precision = "auto",
    batch_size: int = 32,
) -> Tensor:
    """One vector per example from the model's base, which runs once: a second call reads the file of the first.

    By default it is the vector that the model's head reads (BERT: the pooler's output; RoBERTa, DistilBERT, ViT: the
    first position; Llama: the last token), so that a head trained on the features is the model's own head, see
    ``hf_transfer.heads.fit_head``. It is found by trial: what the head reads is the least that leaves the logits as
    they are when everything else is NaN.

    The file is named after the base's weights and configuration, the content of the columns that the model reads, what
    the collator makes of them, ``pooling`` and ``dtype``: what has changed is computed anew. The model is left as it
    was.

    Args:
        model: A transformers model with a head, bare (``pooling="head"`` excepted), or inside a PEFT model.
        dataset: Tokenised (or otherwise prepared) examples.
        data_collator: Makes a padded batch of examples, as for the Trainer.
        cache_dir: Folder for the file.
        pooling: What to keep of the base's output: what the ``"head"`` reads, or of the last hidden states the
            ``"mean"`` over the real tokens, the ``"first"`` or the ``"last"`` one.
        dtype: What the features are computed and stored in. ``"auto"`` is bfloat16 where the device has it natively
            (measured on MiniLM: 0.55 of the time, features 0.7 % off), float32 elsewhere.
        batch_size: Examples in a batch; batches are sorted by length, so that little padding is computed.

    Returns:
        (N, D) in the order of ``dataset``, in ``dtype``.

    Raises:
        ConfigurationError: The head reads more than one vector per example, or the data cannot be fingerprinted.
    """
    poolings = ("head", "mean", "first", "last")
    if pooling not in poolings:
        raise ConfigurationError(f"pooling: unknown '{pooling}'. {nearest(pooling, poolings)}")
    source = _Source(model, dataset, data_collator, batch_size)
    precision = source.precision(dtype)
    path = Path(cache_dir) / source.name(f"features-{pooling}", source.top, precision)
    if not path.exists():
        with evaluating(source.model.core):
            tap = source.model.head_tap(source.probe) if pooling == "head" else Tap("last_hidden_state", pooling)
        if tap.positions == "tokens":
            raise ConfigurationError(
                f"The head of {type(source.model.core).__name__} reads every token, not one vector per example: set "
                "pooling to 'mean', 'first' or 'last', or train the head through PrefixCache."
            )
        source.record({path: tap}, precision)
    features = Activations.open(path)
    return features.values[features.starts]


def reads_every_token(model: nn.Module, dataset: Dataset, data_collator: Collator) -> bool:
    """Whether the model's head reads all tokens (token classification), and not one vector per example."""
    source = _Source(model, dataset, data_collator, batch_size=PROBE_SIZE)
    with evaluating(source.model.core):
        return source.model.head_tap(source.probe).positions == "tokens"


class PrefixCache:
    """The hidden states at the cut between frozen and open blocks, replayed in place of the frozen part.

    While the blocks up to some depth are frozen, they compute the same in every epoch. One pass over the training data
    keeps the input of every block asked for, and a training step then starts there, with no forward pass below. The
    frozen part is thereby in evaluation mode (no dropout).

    Example:
        >>> cache = PrefixCache.build(model, dataset, collator, directory="out/prefix", cuts=[6, 5, 4])
        >>> cache.install(5)                       # depths 0 to 5 are frozen
        >>> with cache.replay(batch):              # takes "example_index" (B,) out of the batch
        ...     loss = model(**batch).loss
        >>> cache.install(4)                       # the next stage of gradual unfreezing
    """

    def __init__(self, replay: Replay, boundaries: Mapping[int, Activations]) -> None:
        self._replay = replay
        self._boundaries = boundaries
        self._depth: int | None = None

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Dataset,
        data_collator: Collator,
        *,
        directory: str | Path,
        cuts: Sequence[int],
        dtype: Precision = "bfloat16",
        batch_size: int = 32,
    ) -> PrefixCache:
        """Store what crosses the ``cuts`` for every example of ``dataset``, or find it stored by an earlier run.

        A cut's file is named after the weights below it, so that a run that resumes with trained blocks above the cut
        finds it again. Before anything is stored, a few examples are replayed at every cut and compared with an
        ordinary forward pass.

        Args:
            model: A transformers model or a PEFT model around one, not yet wrapped for several devices.
            dataset: The training data; ``example_index`` is a row's number in it.
            data_collator: As for the Trainer; it must make the same of an example each time.
            directory: Folder for the files: 2 D bytes per token and cut in bfloat16 (MiniLM, 64 tokens: 48 KiB).
            cuts: Depths (0 embeddings, 1..n blocks) up to which the model is frozen in some stage. At n only the head
                is open, and only what it reads is stored.
            dtype: What is stored. In bfloat16, the pass over the data runs in bfloat16 too where the device has it
                natively, and gradients are 0.1 to 1.1 % off (MiniLM, lowest to highest cut). In float32, gradients
                are the ordinary ones.
            batch_size: Examples in a batch of the pass over the data.

        Raises:
            ConfigurationError: A cut that the model does not have, or a model that cannot be cut there.
        """
        source = _Source(model, dataset, data_collator, batch_size)
        for depth in cuts:
            if not 0 <= depth <= source.top:
                raise ConfigurationError(
                    f"cuts: found depth {depth}, expected 0 (embeddings) to {source.top} (all blocks)."
                )
        precision = source.precision(dtype)
        with evaluating(source.model.core):
            replay = Replay(source.model, source.probe, cuts)
        paths = {depth: Path(directory) / source.name(f"cut-{depth}", depth, precision) for depth in cuts}
        missing = {path: replay.taps[depth] for depth, path in paths.items() if not path.exists()}
        if missing:
            source.record(missing, precision)
        return cls(replay, {depth: Activations.open(path) for depth, path in paths.items()})

    def install(self, depth: int) -> None:
        """From now on a replayed batch starts above ``depth``; a forward pass outside ``replay`` stays ordinary.

        Raises:
            ConfigurationError: ``depth`` is not among the cuts.
        """
        if depth not in self._boundaries:
            raise ConfigurationError(f"depth: {depth} is not among the cuts. {nearest(depth, self._boundaries)}")
        self._depth = depth
        self._replay.install(depth)

    def uninstall(self) -> None:
        """Give the model its own forward methods back: a replayed batch is computed from the bottom."""
        self._depth = None
        self._replay.uninstall()

    @contextmanager
    def replay(self, batch: MutableMapping[str, Tensor]) -> Iterator[None]:
        """Forward passes of ``batch`` in this block start at the cut; ``example_index`` (B,) is taken out of it.

        Raises:
            ConfigurationError: The batch has no ``example_index``, or other tokens than those that were stored.
        """
        if EXAMPLE_INDEX not in batch:
            raise ConfigurationError(f"The batch has no column '{EXAMPLE_INDEX}'. Found: {', '.join(batch)}.")
        examples = batch.pop(EXAMPLE_INDEX).cpu()
        if self._depth is None:
            yield
            return
        with self._replay.feed(self._boundaries[self._depth], examples, batch):
            yield


class _Source:
    """A model and its data: batches sorted by length, the name of what comes of them, and the pass that records it."""

    def __init__(self, model: nn.Module, dataset: Dataset, data_collator: Collator, batch_size: int) -> None:
        self.model = CutModel(model)
        self.top = len(self.model.blocks)
        core = self.model.core
        targets = {"label", "label_ids", *find_labels(type(core))}
        self._batches = Batches(
            dataset,
            data_collator,
            main_input=core.main_input_name,
            inputs=inspect.signature(core.forward).parameters.keys() - targets,
            targets=targets,
            device=core.device,
        )
        self._order = self._batches.by_length()
        self._batch_size = batch_size
        self.probe, seen = self._batches.probe(self._order)
        self._origin = (
            transformers.__version__,
            type(core).__name__,
            {key: value for key, value in core.config.to_dict().items() if key not in _BESIDE_THE_BASE},
            adapter_settings(model),
            self._batches.digest(),
            seen,
            tensors_digest(dict(model.named_buffers())),
        )
        self._weights = _digest_by_depth(model)

    def precision(self, dtype: Precision) -> torch.dtype:
        """What to store: ``dtype``, or bfloat16 where that is left open and the device has it natively."""
        choices = ("auto", "bfloat16", "float16", "float32")
        if dtype not in choices:
            raise ConfigurationError(f"dtype: unknown '{dtype}'. {nearest(dtype, choices)}")
        if dtype == "auto":
            return torch.bfloat16 if _has_bfloat16(self.model.core.device) else torch.float32
        return getattr(torch, dtype)

    def name(self, kind: str, depth: int, precision: torch.dtype) -> str:
        """``kind`` and a fingerprint of everything that the hidden states above ``depth`` follow from."""
        below = [digest for at, digest in self._weights.items() if at <= depth]
        return f"{kind}-{fingerprint(kind, depth, str(precision), self._origin, below)}.safetensors"

    def record(self, taps: Mapping[Path, Tap], precision: torch.dtype) -> None:
        """Run the base once over the data and write what each tap keeps to its file."""
        core = self.model.core
        fast = precision == torch.bfloat16 and core.dtype == torch.float32 and _has_bfloat16(core.device)
        examples = len(self._batches)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(ActivationWriter(path, examples=examples, dtype=precision)) for path in taps
            ]
            stack.enter_context(evaluating(core))
            stack.enter_context(skipping_zero_layers(core))
            stack.enter_context(torch.autocast(core.device.type, dtype=torch.bfloat16, enabled=fast))
            for rows in tqdm(self._order.split(self._batch_size), desc="frozen part", unit="batch", disable=None):
                kept = self.model.run(self._batches[rows], list(taps.values()))
                for writer, activations in zip(writers, kept, strict=True):
                    writer.append(rows, activations)


def _digest_by_depth(model: nn.Module) -> dict[int, str]:
    depths = parameter_depths(model)
    at: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        at[depths[name]][name] = parameter
    return {depth: tensors_digest(at[depth]) for depth in sorted(at)}


def _has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
