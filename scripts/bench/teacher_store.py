"""What an offline teacher's store takes on disk, and how long its rows take to read and decode.

    python scripts/bench/teacher_store.py [--teacher FOLDER] [--texts FILE] [--vocabulary 32000] [--rounds 20]

FOLDER holds a causal language model of transformers with its tokenizer, FILE jsonl(.gz) with "text"; without them, a
random Llama and random tokens. Batches of 8 examples of 256 tokens, drawn at random over all shards, from the memory
map to what the loss takes (ids, log-probabilities and tail at a temperature; ids, weights and entropy). CPU
microseconds of the process at one thread; the median of the rounds. Goals: samples within 60 bytes and 2 microseconds
per token. DistillKit's store, as measured elsewhere (quoted, not run here): 328 bytes and 10.9 microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_transfer.teacher_store import TeacherStore

BATCH, LENGTH = 8, 256


def random_teacher(vocabulary: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    teacher = LlamaForCausalLM(config)
    teacher.lm_head.weight.data.mul_(15)  # logits spread as a trained model's
    return teacher


def tokens_of(texts: Path, folder: Path, count: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=str(texts), split="train")
    ids: list[int] = []
    for text in rows["text"]:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    raise SystemExit(f"{texts} holds {len(ids)} tokens, fewer than the {count * LENGTH} of --examples {count}.")


def microseconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher) if options.teacher else None
    teacher = teacher or random_teacher(options.vocabulary)
    vocabulary = teacher.config.vocab_size
    if options.texts:
        tokens = tokens_of(options.texts, options.teacher, options.examples)
    else:
        tokens = torch.randint(3, vocabulary, (options.examples, LENGTH))
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    print(f"vocabulary {vocabulary:,}, {options.examples} examples of {LENGTH} tokens, batches of {BATCH}")
    print(f"{'form':<22}{'bytes/token':>12}{'us/token, read and decode':>28}{'us/token, teacher and store':>30}")
    with tempfile.TemporaryDirectory() as folder:
        for form, size, temperatures in (("top_k", {"k": 64}, (1.0, 3.0)), ("samples", {"draws": 12}, (1.0,))):
            directory = Path(folder) / form
            start = time.process_time()
            store = TeacherStore.build(
                teacher,
                rows,
                default_data_collator,
                directory=directory,
                form=form,
                batch_size=BATCH,
                rows_per_shard=16 * LENGTH,
                **size,
            )
            taught = (time.process_time() - start) * 1e6 / store.row_count
            bytes_per_token = sum(path.stat().st_size for path in directory.iterdir()) / store.row_count
            for temperature in temperatures:
                times = []
                for _ in range(options.rounds):
                    examples = torch.randperm(options.examples)[:BATCH]
                    spent = microseconds(lambda: store.rows(examples).at_temperature(temperature))  # noqa: B023
                    times.append(spent / (BATCH * (LENGTH - 1)))
                name = f"{form} {next(iter(size.values()))}, T = {temperature:g}"
                print(f"{name:<22}{bytes_per_token:>12.1f}{statistics.median(times):>28.3f}{taught:>30.0f}")


if __name__ == "__main__":
    main()
