"""What a teacher says of every position that is learnt from, run once, kept on disk and read without the teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_transfer.activations import fingerprint
from hf_transfer.batches import Collator
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.losses import LossKind
from hf_transfer.teacher_pass import Source, TeacherPass
from hf_transfer.teacher_rows import Columns, Form, SamplesForm, TeacherRows, TopKForm

if TYPE_CHECKING:
    from datasets import Dataset

FormName = Literal["top_k", "samples"]

MANIFEST = "teacher.json"
_VERSION = 1
_MEND = "Delete '{}' and run the teacher again: it computes that shard only."
_FORMS: dict[str, type[Form]] = {"top_k": TopKForm, "samples": SamplesForm}


@dataclass(frozen=True)
class _Shard:
    """The columns of one file, mapped into memory, and what they were made from."""

    columns: Columns
    origin: Mapping[str, Any]


class TeacherStore:
    """A teacher's distributions over a data set, read from disk by memory map: training needs no teacher.

    There is one row for every position that has something to learn. For a causal language model that is position t
    where ``labels[t + 1]`` is not -100; for a model that classifies tokens, t where ``labels[t]`` is not; a classifier
    of examples has one row per example.

    The folder holds safetensors files of a fixed number of examples each, with columns of fixed width, and a manifest
    that is written last. Bytes per row, for a vocabulary up to 65,536 (above): ``4 k + 24`` (``5 k + 24``) for the
    top k, ``2 draws + 4`` (``3 draws + 4``) for samples: 28 (40) for 12 draws.

    Example:
        >>> TeacherStore.build(teacher, dataset, collator, directory="out/teacher", form="samples")
        >>> store = TeacherStore.open("out/teacher", dataset, collator)      # another day, another machine
        >>> target = store.rows(batch["example_index"]).at_temperature(1.0)  # Samples(ids, weights, entropy)
    """

    def __init__(self, root: Path, manifest: Mapping[str, Any], shards: Sequence[_Shard]) -> None:
        self.directory = root
        self._manifest = manifest
        self._form = _form(manifest["identity"])
        self.vocabulary: int = manifest["vocabulary"]
        """Over how many classes or tokens the distributions are."""
        self.kind: LossKind = manifest["kind"]
        """What the teacher predicts."""
        self.label_names: list[str] | None = manifest["label_names"]
        """A classifier's classes, in the order of their numbers."""
        self._examples_per_shard: int = manifest["examples_per_shard"]
        self._starts, self._lengths = (
            torch.cat([shard.columns[name] for shard in shards]) for name in ("starts", "lengths")
        )
        names = shards[0].columns.keys() - {"starts", "lengths"}
        self._columns = {name: [shard.columns[name] for shard in shards] for name in names}

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        dataset: Dataset,
        data_collator: Collator,
        *,
        directory: str | Path,
        form: FormName = "top_k",
        k: int = 64,
        draws: int = 12,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        rows_per_shard: int = 1 << 18,
        tokenizer: Any = None,
        vocabulary: int | None = None,
        name: str | None = None,
    ) -> TeacherStore:
        """Run the teacher once over the data, or go on where a killed run stopped, or find everything there.

        The teacher runs in evaluation mode, on its own device and in its own precision, and is left as it was. Beyond
        its logits, 64 MiB of float32 are held at a time.

        Args:
            teacher: A language model, with an encoder or without, or a classifier of transformers, bare or inside a
                PEFT model.
            dataset: The training data; a row's number in it is its ``example_index``.
            data_collator: As for the Trainer, with labels; it must make the same of an example each time.
            directory: The store's folder; it holds one store.
            form: ``"top_k"`` serves every temperature from 1 up, and keeps the whole distribution of a classifier with
                at most ``k`` classes; ``"samples"`` is smaller, and unbiased, at one temperature.
            k: Tokens of the form ``"top_k"``.
            draws: Of the form ``"samples"``, per row.
            temperature: What samples are drawn at.
            seed: Of the draws; those of an example follow from ``seed`` and its number alone.
            batch_size: Examples in a batch; batches are sorted by length within a shard.
            rows_per_shard: About what a file holds, in memory while it is filled, and what a kill can cost.
            tokenizer: The one that made the data, or the image processor or feature extractor; a store opened with
                another one is then refused.
            vocabulary: Store distributions over so many leading tokens only: those that the student has too, where
                its vocabulary is padded to another length (``shared_vocabulary``).
            name: The teacher's, kept for those who read the store.

        Raises:
            ConfigurationError: A setting out of range, a teacher whose outputs are no distributions over classes or
                not finite, data that cannot be named, or a folder that holds a store of something else.
        """
        settings = _settings(form, k=k, draws=draws, temperature=temperature, seed=seed)
        for option, number in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
            if number < 1:
                raise ConfigurationError(f"{option}: found {number}, expected at least 1.")
        speaker = TeacherPass(teacher)
        batches = speaker.source.batches(dataset, data_collator, speaker.device)
        if not len(batches):
            raise ConfigurationError("dataset: it has no examples.")
        order = batches.by_length()
        probe, seen = batches.probe(torch.arange(len(batches)))
        identity = settings | {
            "teacher": speaker.digest(),
            "tokenizer": _processor_digest(tokenizer),
            "data": batches.digest(),
            "collator": seen,
            "vocabulary": vocabulary,
        }
        root = Path(directory)
        if (root / MANIFEST).exists():
            manifest = _read_manifest(root)
            _refuse_other(root, manifest["identity"], identity)
            return cls(root, manifest, _open_shards(root, manifest))

        root.mkdir(parents=True, exist_ok=True)
        per_shard = max(1, rows_per_shard // speaker.source.most_rows(probe))
        shards = []
        for number, first in enumerate(tqdm(range(0, len(batches), per_shard), desc="teacher", disable=None)):
            path = root / f"shard-{number:05}.safetensors"
            last = min(first + per_shard, len(batches))
            origin = {"identity": identity, "examples": [first, last]}
            if not _is_done(path, origin):
                examples = order[(order >= first) & (order < last)]
                columns, size = speaker.rows_of(
                    batches,
                    examples,
                    form=_form(identity),
                    seed=seed,
                    batch_size=batch_size,
                    vocabulary=vocabulary,
                )
                text = json.dumps(origin | {"vocabulary": size}, sort_keys=True)
                save_file(columns, path.with_suffix(".part"), metadata={"origin": text})
                os.replace(path.with_suffix(".part"), path)
            shards.append({"name": path.name, "bytes": path.stat().st_size})
        manifest = {
            "version": _VERSION,
            "identity": identity,
            "source": asdict(speaker.source),
            "name": name,
            "kind": speaker.kind,
            "label_names": speaker.label_names,
            "examples": len(batches),
            "examples_per_shard": per_shard,
            "vocabulary": _open_shard(path).origin["vocabulary"],
            "shards": shards,
        }
        opened = _open_shards(root, manifest)
        part = root / f"{MANIFEST}.part"
        part.write_text(json.dumps(manifest, indent=1))
        os.replace(part, root / MANIFEST)
        return cls(root, manifest, opened)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        dataset: Dataset,
        data_collator: Collator,
        *,
        tokenizer: Any = None,
        **wanted: Any,
    ) -> TeacherStore:
        """The finished store in ``directory``, once it is known to be whole and of these data.

        Args:
            directory: As for ``build``.
            dataset: The data to train on; columns that the teacher did not read may differ.
            data_collator: The one to train with.
            tokenizer: The one to train with, if it should be compared with the one that made the store's data.
            **wanted: What it should have been built with: form, k, draws, temperature, seed or name, of which those
                that its form does not have are passed over.

        Raises:
            ConfigurationError: There is no store, it is not finished, a file is cut short or of another store, or the
                data, the collator, the tokenizer or a setting are others than it was built from.
        """
        root = Path(directory)
        manifest = _read_manifest(root)
        _check_data(root, manifest, dataset, data_collator)
        if tokenizer is not None:
            wanted["tokenizer"] = _processor_digest(tokenizer)
        stored = manifest["identity"] | {"name": manifest["name"]}
        _refuse_other(root, stored, stored | {key: wanted[key] for key in wanted.keys() & stored})
        return cls(root, manifest, _open_shards(root, manifest))

    def check(self, dataset: Dataset, data_collator: Collator) -> None:
        """Refuse other data than the store was built from.

        Args:
            dataset: As for ``open``.
            data_collator: As for ``open``.

        Raises:
            ConfigurationError: They are others, or in another order.
        """
        _check_data(self.directory, self._manifest, dataset, data_collator)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._lengths)

    @property
    def row_count(self) -> int:
        """How many rows there are: labelled positions, or examples."""
        return int(self._lengths.sum())

    def rows(self, examples: Tensor) -> TeacherRows:
        """The rows of ``examples`` (B,), one example after the other, each in the order of its positions.

        For a causal language model that is the order of ``labels[:, 1:][labels[:, 1:] != -100]``. Rows are decoded on
        the device of ``examples``, to which they go as they are stored.

        Raises:
            ConfigurationError: The store has no example of such a number.
        """
        chosen = examples.cpu()
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise ConfigurationError(
                f"example_index: found {chosen.tolist()}, but the store has the examples 0 to {len(self) - 1}."
            )
        numbers = (chosen // self._examples_per_shard).tolist()
        starts = self._starts[chosen]
        places = list(zip(numbers, starts.tolist(), (starts + self._lengths[chosen]).tolist(), strict=True))
        columns = {
            name: torch.cat([shards[0][:0], *(shards[number][start:stop] for number, start, stop in places)])
            for name, shards in self._columns.items()
        }
        columns = {name: column.to(examples.device) for name, column in columns.items()}
        return self._form.decode(columns, vocabulary=self.vocabulary)


def _settings(form: str, *, k: int, draws: int, temperature: float, seed: int) -> dict[str, Any]:
    """The form's part of a store's identity."""
    if form not in _FORMS:
        raise ConfigurationError(f"form: unknown '{form}'. {nearest(form, _FORMS)}")
    if form == "top_k" and temperature != 1:
        raise ConfigurationError(
            f"temperature: found {temperature}, but the form 'top_k' serves every temperature. Leave it at 1."
        )
    return {"form": form, **asdict(TopKForm(k) if form == "top_k" else SamplesForm(draws, temperature, seed))}


def _check_data(root: Path, manifest: Mapping[str, Any], dataset: Dataset, data_collator: Collator) -> None:
    batches = Source(**manifest["source"]).batches(dataset, data_collator)
    if len(batches) != manifest["examples"]:
        raise ConfigurationError(
            f"dataset: found {len(batches)} examples, but the teacher's store in '{root}' is of "
            f"{manifest['examples']}: expected the data it was built from, in the same order."
        )
    _, seen = batches.probe(torch.arange(len(batches)))
    wanted = manifest["identity"] | {"data": batches.digest(), "collator": seen}
    _refuse_other(root, manifest["identity"], wanted)


def _form(identity: Mapping[str, Any]) -> Form:
    kind = _FORMS[identity["form"]]
    return kind(**{field.name: identity[field.name] for field in fields(kind)})


def _processor_digest(processor: Any) -> str | None:
    if processor is None:
        return None
    if hasattr(processor, "get_vocab"):
        return fingerprint(processor.get_vocab(), processor.special_tokens_map)
    return fingerprint(processor.to_dict())


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.exists():
        shards = len(list(root.glob("shard-*.safetensors")))
        found = f" but {shards} shards of an unfinished one: run the teacher again, it goes on from there"
        raise ConfigurationError(f"'{root}' holds no teacher's store{found if shards else ''}.")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"'{path}' is damaged ({error!r}): delete it and run the teacher again.") from error
    if version != _VERSION:
        raise ConfigurationError(f"'{path}': found version {version} of the format, expected {_VERSION}.")
    return manifest


def _open_shards(root: Path, manifest: Mapping[str, Any]) -> list[_Shard]:
    """All shards, each as long as it was, of this store, and in its place."""
    shards = []
    for number, shard in enumerate(manifest["shards"]):
        path = root / shard["name"]
        found = path.stat().st_size if path.exists() else 0
        if found != shard["bytes"]:
            raise ConfigurationError(
                f"'{path}' is cut short or was changed: found {found:,} bytes, expected {shard['bytes']:,}. "
                f"{_MEND.format(root / MANIFEST)}"
            )
        opened = _open_shard(path)
        _refuse_other(path, opened.origin.get("identity", {}), manifest["identity"])
        first = number * manifest["examples_per_shard"]
        if opened.origin["examples"][0] != first:
            raise ConfigurationError(
                f"'{path}' begins with example {opened.origin['examples'][0]}, expected {first}: it is another shard. "
                f"{_MEND.format(root / MANIFEST)}"
            )
        shards.append(opened)
    return shards


def _open_shard(path: Path) -> _Shard:
    """Map a shard into memory; its rows are read from disk when they are used."""
    try:
        with safe_open(path, framework="pt") as file:
            origin = json.loads((file.metadata() or {}).get("origin", "{}"))
            return _Shard({name: file.get_tensor(name) for name in file.keys()}, origin)
    except SafetensorError as error:
        raise ConfigurationError(f"'{path}' is damaged ({error}). {_MEND.format(path.with_name(MANIFEST))}") from error


def _is_done(path: Path, origin: Mapping[str, Any]) -> bool:
    """Whether an earlier run has written this shard; one of another store is refused, not overwritten."""
    if not path.exists():
        return False
    try:
        found = _open_shard(path).origin
    except ConfigurationError:
        return False
    _refuse_other(path, found.get("identity", {}), origin["identity"])
    return found["examples"] == origin["examples"]


def _refuse_other(place: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Name what a store was built from that is not what is wanted of it."""
    different = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
    if different:
        parts = "; ".join(f"{name}: found {wanted.get(name)}, stored {stored.get(name)}" for name in different)
        raise ConfigurationError(
            f"'{place}' was built from something else ({parts}). Use what it was built from, or another directory; "
            "nothing is overwritten."
        )
