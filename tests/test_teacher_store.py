"""A teacher's distributions come back from disk as they were, of the right data, or not at all."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForTokenClassification, GPT2Config, GPT2LMHeadModel

from hf_transfer.errors import ConfigurationError
from hf_transfer.teacher_pass import TeacherPass, encoded_rows
from hf_transfer.teacher_rows import SamplesForm, TopKForm
from hf_transfer.teacher_store import MANIFEST, TeacherStore
from tests.tiny import VOCABULARY, collate, language_rows, text_rows, tiny_bert, tiny_llama

EXAMPLES = 12


def loud_llama(seed=0):
    """A tiny Llama with the spread of logits of a trained one."""
    teacher = tiny_llama(seed=seed)
    teacher.lm_head.weight.data.mul_(60)
    return teacher


@cache
def rows():
    return language_rows(EXAMPLES).remove_columns("domain")


def build(folder, teacher=None, dataset=None, **options):
    options = {"form": "top_k", "k": 8, "batch_size": 4, "rows_per_shard": 20} | options
    dataset = rows() if dataset is None else dataset
    return TeacherStore.build(teacher or loud_llama(), dataset, collate, directory=folder, **options)


def true_logits(teacher, examples) -> torch.Tensor:
    """(N, V) in float64, one example at a time and without padding: what the store should know."""
    dataset = rows()
    found = []
    for example in examples:
        row = dataset[int(example)]
        logits = teacher.double()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        found.append(logits[torch.tensor(row["labels"][1:]) != -100])
    teacher.float()
    return torch.cat(found).detach()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_top_k_and_tail_are_the_teachers(tmp_path, temperature):
    teacher = loud_llama()
    store = build(tmp_path, teacher)
    chosen = torch.tensor([7, 0, 11, 7])
    found = store.rows(chosen).at_temperature(temperature)
    expected = (true_logits(teacher, chosen) / temperature).log_softmax(-1)
    top, ids = expected.topk(8)

    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probabilities.double(), top, atol=4e-3, rtol=0)
    torch.testing.assert_close(found.log_probabilities.exp().double(), top.exp(), atol=3e-4, rtol=0)
    tail = expected.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.tail_log_probability.double(), tail, atol=1e-3, rtol=0)
    total = found.log_probabilities.exp().sum(-1) + found.tail_log_probability.exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.2, 1.5, 3.0, 8.0, 100.0])
def test_tail_between_the_stored_temperatures(tmp_path, temperature):
    """Logits with tails heavier than a language model's: the polynomial is within 0.002 of the exact probability."""
    torch.manual_seed(0)
    logits = torch.distributions.StudentT(4.0).sample((50, 2000)) * 2
    form = TopKForm(32)
    found = form.decode(form.encode(logits.clone(), torch.zeros(50)), vocabulary=2000).at_temperature(temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    tail = exact.scatter(-1, found.ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.tail_log_probability.exp().double(), tail.exp(), atol=2e-3, rtol=0)
    assert tail.exp().max() > 0.03


def test_rows_follow_the_labels_of_the_batch(tmp_path):
    """Ragged labels, some masked, in any order of the examples: one row per label, as the loss sees them."""
    teacher = loud_llama()
    store = build(tmp_path, teacher, form="top_k", k=VOCABULARY)
    order = torch.tensor([3, 9, 1, 4])
    dataset = rows()
    batch = collate([dataset[int(index)] for index in order])
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = teacher(**inputs).logits[:, :-1][kept].log_softmax(-1)
    found = store.rows(order).at_temperature(1.0)

    assert kept.sum() < kept.numel()
    assert len(found.ids) == kept.sum()
    torch.testing.assert_close(
        torch.empty_like(expected).scatter_(-1, found.ids, found.log_probabilities), expected, atol=1e-3, rtol=1e-3
    )
    assert store.row_count == sum((torch.tensor(row[1:]) != -100).sum() for row in dataset["labels"])
    assert len(store) == EXAMPLES
    assert len(store.rows(order[:0])) == 0


def test_samples_are_unbiased_and_come_as_often_as_they_can():
    torch.manual_seed(0)
    logits = torch.randn(3, 30) * 2
    probabilities = (logits.double() / 1.5).softmax(-1)
    form = SamplesForm(draws=5, temperature=1.5)
    count = 20_000
    uniforms = torch.rand(3 * count)
    rows = form.decode(form.encode(logits.repeat(count, 1), uniforms), vocabulary=30)
    samples = rows.at_temperature(1.5)
    counts = torch.zeros(3 * count, 30).scatter_add_(-1, samples.ids, torch.ones_like(samples.weights))

    assert ((counts - 5 * probabilities.repeat(count, 1)).abs() < 1 + 1e-5).all()  # floor(draws p), or one more
    mean = counts.view(count, 3, 30).mean(0, dtype=torch.float64) / 5
    error = (probabilities * (1 - probabilities) / (5 * count)).sqrt()
    assert ((mean - probabilities).abs() < 5 * error + 1e-6).all()
    torch.testing.assert_close(samples.weights.sum(-1), torch.ones(3 * count))
    entropy = torch.special.entr(probabilities).sum(-1)
    torch.testing.assert_close(samples.entropy[:3].double(), entropy, atol=1e-5, rtol=0)


def test_systematic_draws_have_less_variance_than_independent_ones():
    torch.manual_seed(0)
    logits = (torch.randn(1, 200) * 3).repeat(4000, 1)
    probabilities = logits.softmax(-1)
    student = torch.randn(200)
    form = SamplesForm(draws=12)
    systematic = form.decode(form.encode(logits.clone(), torch.rand(4000)), vocabulary=200).ids
    independent = torch.multinomial(probabilities, 12, replacement=True)
    ours, theirs = (student[ids].mean(-1).var() for ids in (systematic, independent))
    assert ours < 0.6 * theirs


def test_stored_draws_are_the_seeds(tmp_path):
    """They follow from the seed and the example, not from batches and shards."""
    chosen = torch.arange(EXAMPLES)
    one = build(tmp_path / "a", form="samples", draws=6)
    other_batches = build(tmp_path / "b", form="samples", draws=6, batch_size=3, rows_per_shard=1000)
    other_seed = build(tmp_path / "c", form="samples", draws=6, seed=1)
    first, second, third = (store.rows(chosen).at_temperature(1.0) for store in (one, other_batches, other_seed))
    assert (first.ids == second.ids).float().mean() > 0.99  # a batch's padding may change a logit's last bit
    assert (first.ids != third.ids).any()
    assert torch.equal(first.ids, first.ids.sort(-1).values)
    torch.testing.assert_close(first.entropy, second.entropy)


@pytest.mark.parametrize("form", ["top_k", "samples"])
def test_ids_beyond_two_bytes(form):
    torch.manual_seed(0)
    logits = torch.randn(4, 70_000)
    logits[torch.arange(4), torch.tensor([3, 65_535, 65_536, 69_999])] = 40
    codec = TopKForm(2) if form == "top_k" else SamplesForm(2)
    columns = codec.encode(logits, torch.full((4,), 0.5))
    assert {name: column.element_size() for name, column in columns.items() if "ids" in name} == {
        "ids": 2,
        "ids_high": 1,
    }
    found = codec.decode(columns, vocabulary=70_000).at_temperature(1.0)
    assert found.ids[:, 0].tolist() == [3, 65_535, 65_536, 69_999]


def test_impossible_tokens_leave_everything_finite():
    """Logits of -inf (tokens ruled out), in the top k, in the tail, or as all of the tail."""
    logits = torch.full((2, 10), -torch.inf)
    logits[0, :2] = torch.tensor([1.0, 2.0])
    logits[1, :6] = torch.arange(6.0)
    form = TopKForm(4)
    found = form.decode(form.encode(logits.clone(), torch.zeros(2)), vocabulary=10).at_temperature(2.0)
    assert all(tensor.isfinite().all() for tensor in found)
    exact = (logits / 2).log_softmax(-1).exp()
    torch.testing.assert_close(found.log_probabilities.exp(), exact.gather(-1, found.ids), atol=1e-3, rtol=0)
    samples = SamplesForm(7).encode(logits, torch.tensor([0.999, 0.0]))
    assert samples["entropies"].isfinite().all()
    assert samples["ids"].int()[0].max() < 2


class _Largest(TorchDispatchMode):
    """The most elements that any tensor has that an operation makes, but for views of ``given``."""

    def __init__(self, given):
        super().__init__()
        self.given = given.data_ptr()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != self.given:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("form", [TopKForm(4), SamplesForm(6)])
def test_the_softmax_is_computed_in_chunks(form, monkeypatch):
    torch.manual_seed(0)
    logits, positions = torch.randn(4, 9, 50), torch.rand(4, 9) < 0.7
    uniforms = torch.rand(int(positions.sum()))
    (whole,) = encoded_rows(logits, positions, uniforms, form)
    monkeypatch.setattr("hf_transfer.teacher_pass._CHUNK", 5 * 50)
    with _Largest(logits) as largest:
        chunks = list(encoded_rows(logits, positions, uniforms, form))
    assert largest.numel <= 5 * 50
    for name, column in whole.items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), column)


def test_teacher_is_left_as_it_was(tmp_path):
    teacher = loud_llama().train()
    teacher.model.layers[1].eval()
    before = {name: module.training for name, module in teacher.named_modules()}
    build(tmp_path, teacher)
    assert {name: module.training for name, module in teacher.named_modules()} == before
    assert teacher.config.use_cache
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("form", ["top_k", "samples"])
def test_killed_and_run_again_is_the_straight_run(tmp_path, form):
    """Killed in the third shard, the second cut short: the same bytes again, and the first is not computed again."""
    teacher = loud_llama()
    build(tmp_path / "straight", teacher, form=form)
    straight = contents(tmp_path / "straight")
    assert len(straight) > 4

    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    killing = teacher.register_forward_pre_hook(lambda *_: _kill_after(2, calls))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", teacher, form=form)
    killing.remove()
    left = contents(tmp_path / "killed")
    assert len(left) == 2
    with pytest.raises(ConfigurationError, match="2 shards of an unfinished one: run the teacher again"):
        TeacherStore.open(tmp_path / "killed", rows(), collate)
    os.truncate(tmp_path / "killed" / sorted(left)[-1], 100)
    (tmp_path / "killed" / "shard-00003.part").write_bytes(b"half")
    calls.clear()
    build(tmp_path / "killed", teacher, form=form)
    assert len(calls) == len(straight) - 1 - 1  # all but the manifest and the first shard, one batch each
    assert contents(tmp_path / "killed") == straight

    calls.clear()
    build(tmp_path / "killed", teacher, form=form)
    assert not calls


def _kill_after(count, calls):
    if len(calls) > count:
        raise KeyboardInterrupt


def test_values_are_mapped_not_read(tmp_path):
    """What the store holds lies in the mapped files themselves."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("No /proc/self/maps here to see mapped files in.")
    store = build(tmp_path)
    mapped = [line.split() for line in maps.read_text().splitlines() if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    columns = [column for shards in store._columns.values() for column in shards]
    assert len(columns) > 6
    assert all(any(first <= column.data_ptr() < last for first, last in ranges) for column in columns)


def test_shards_are_ordinary_safetensors_of_the_stated_size(tmp_path):
    build(tmp_path, form="samples", draws=12)
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    count = sum(len(shard["entropies"]) for shard in shards)
    stored = sum(shard[name].nbytes for shard in shards for name in ("ids", "entropies"))
    assert stored == 28 * count
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["vocabulary"], manifest["examples"]) == (VOCABULARY, EXAMPLES)


def changed_rows():
    dataset = rows()
    return dataset.map(
        lambda row, index: {"labels": row["labels"][:-1] + [-100]} if index == 5 else row, with_indices=True
    )


def other_collate(batch):
    return collate(batch) | {"attention_mask": torch.ones_like(collate(batch)["attention_mask"])}


FOREIGN = {
    "data: found .*, stored": {"dataset": changed_rows},
    "data: found .*nothing is overwritten": {"dataset": lambda: rows().select(range(EXAMPLES - 1, -1, -1))},
    "found 11 examples, but the teacher's store in .* is of 12": {"dataset": lambda: rows().select(range(11))},
    "collator: found .*, stored": {"collator": other_collate},
    "expected a column 'input_ids'": {"dataset": lambda: rows().rename_column("input_ids", "tokens")},
    "found list, expected a datasets.Dataset": {"dataset": lambda: list(rows())},
}


@pytest.mark.parametrize("message", FOREIGN)
def test_other_data_are_refused(tmp_path, message):
    build(tmp_path)
    case = {"dataset": rows, "collator": collate} | FOREIGN[message]
    with pytest.raises(ConfigurationError, match=message):
        TeacherStore.open(tmp_path, case["dataset"](), case["collator"])


def test_columns_that_the_teacher_does_not_read_may_differ(tmp_path):
    built = build(tmp_path)
    dataset = rows().add_column("example_index", list(range(EXAMPLES)))
    opened = TeacherStore.open(tmp_path, dataset, lambda batch: collate(batch))
    chosen = torch.tensor([2, 3])
    assert torch.equal(
        opened.rows(chosen).at_temperature(1.0).log_probabilities,
        built.rows(chosen).at_temperature(1.0).log_probabilities,
    )


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("k: found 9, stored 8", {"k": 9}),
        ("draws: found 12, stored None; form: found samples, stored top_k", {"form": "samples"}),
        ("teacher: found .*, stored", {"teacher": loud_llama(seed=1)}),
        ("data: found .*, stored", {"dataset": changed_rows()}),
    ],
)
def test_nothing_is_overwritten_by_another_store(tmp_path, message, options, finished):
    build(tmp_path)
    if not finished:
        (tmp_path / MANIFEST).unlink()
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, **options)
    assert contents(tmp_path) == before


class _Words:
    """As much of a tokenizer as names it."""

    def __init__(self, *words):
        self.words, self.special_tokens_map = words, {"pad_token": words[0]}

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}


def test_another_tokenizer_is_refused(tmp_path):
    build(tmp_path, tokenizer=_Words("a", "b"))
    TeacherStore.open(tmp_path, rows(), collate)
    TeacherStore.open(tmp_path, rows(), collate, tokenizer=_Words("a", "b"))
    with pytest.raises(ConfigurationError, match="tokenizer: found .*, stored"):
        TeacherStore.open(tmp_path, rows(), collate, tokenizer=_Words("b", "a"))


def _truncate(folder):
    os.truncate(folder / "shard-00001.safetensors", 200)


def _corrupt(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def _swap(folder):
    first, second = (folder / f"shard-0000{number}.safetensors" for number in (0, 1))
    (a, b), manifest = (first.read_bytes(), second.read_bytes()), json.loads((folder / MANIFEST).read_text())
    first.write_bytes(b)
    second.write_bytes(a)
    manifest["shards"][0]["bytes"], manifest["shards"][1]["bytes"] = len(b), len(a)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _version(folder):
    (folder / MANIFEST).write_text('{"version": 99}')


DAMAGES = {
    r"shard-00001.*cut short.*found 200 bytes, expected [\d,]+\. Delete": _truncate,
    "shard-00001.*is damaged.*computes that shard only": _corrupt,
    "shard-00000.*begins with example": _swap,
    "shard-00002.*found 0 bytes": lambda folder: (folder / "shard-00002.safetensors").unlink(),
    "teacher.json.*is damaged": lambda folder: os.truncate(folder / MANIFEST, 30),
    "found version 99 of the format, expected 1": _version,
    "holds no teacher's store": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_stores_are_refused(tmp_path, message):
    build(tmp_path)
    DAMAGES[message](tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        TeacherStore.open(tmp_path, rows(), collate)


def test_a_damaged_shard_is_mended_as_the_message_says(tmp_path):
    build(tmp_path)
    before = contents(tmp_path)
    _truncate(tmp_path)
    (tmp_path / MANIFEST).unlink()
    build(tmp_path)
    assert contents(tmp_path) == before


def broken_llama():
    teacher = loud_llama()
    teacher.lm_head.weight.data[3] = torch.nan
    return teacher


SETTINGS = {
    "form: unknown 'topk'. Did you mean 'top_k'": {"form": "topk"},
    "k: found 0, expected": {"k": 0},
    "draws: found 0, expected": {"form": "samples", "draws": 0},
    "temperature: found 0.0, expected a positive": {"form": "samples", "temperature": 0.0},
    "temperature: found 2.0, but the form 'top_k' serves": {"temperature": 2.0},
    "batch_size: found 0, expected at least 1": {"batch_size": 0},
    "rows_per_shard: found 0, expected at least 1": {"rows_per_shard": 0},
    "it has no examples": {"dataset": rows().select([])},
    "Linear is not a transformers model": {"teacher": nn.Linear(2, 2)},
    "problem_type is 'regression'": {"teacher": tiny_bert(problem_type="regression", num_labels=1)},
    "its logits are not finite": {"teacher": broken_llama()},
    r"labels: found none in the batch, expected \(4, \d+\)": {"dataset": rows().remove_columns("labels")},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_cannot_work(tmp_path, message):
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, **SETTINGS[message])


def test_temperatures_and_examples_that_are_not_stored(tmp_path):
    store = build(tmp_path / "top_k")
    with pytest.raises(ConfigurationError, match="temperature: found 0.5, expected at least 1"):
        store.rows(torch.tensor([0])).at_temperature(0.5)
    for example in (-1, EXAMPLES):
        with pytest.raises(ConfigurationError, match=rf"found \[{example}\], but the store has the examples 0 to 11"):
            store.rows(torch.tensor([example]))
    samples = build(tmp_path / "samples", form="samples", temperature=2.0)
    assert len(samples.rows(torch.tensor([0])).at_temperature(2).ids)
    with pytest.raises(ConfigurationError, match="found 1.0, but the store's samples were drawn at 2.0"):
        samples.rows(torch.tensor([0])).at_temperature(1.0)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_classifiers_whole_distribution_is_stored(tmp_path, labelled):
    """One row per example, its label masked, kept or not there at all; no tail."""
    teacher = tiny_bert(seed=2)
    teacher.classifier.weight.data.mul_(30)
    dataset = text_rows(EXAMPLES).remove_columns("domain")
    dataset = dataset.map(lambda row: {"labels": -100}) if labelled else dataset.remove_columns("labels")
    store = build(tmp_path, teacher, dataset, k=64, rows_per_shard=5)
    chosen = torch.tensor([8, 2, 2])
    found = store.rows(chosen).at_temperature(3.0)
    batch = collate([dataset[int(index)] for index in chosen])
    with torch.no_grad():
        expected = (teacher(batch["input_ids"], batch["attention_mask"]).logits / 3).log_softmax(-1)

    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert store.row_count == EXAMPLES
    assert torch.equal(found.tail_log_probability, torch.full((3,), -torch.inf))
    torch.testing.assert_close(
        torch.empty_like(expected).scatter_(-1, found.ids, found.log_probabilities), expected, atol=1e-3, rtol=0
    )


def test_a_token_classifier_is_asked_about_the_labelled_token(tmp_path):
    """Position t is compared with ``labels[t]`` there, not with the next."""
    teacher = BertForTokenClassification(tiny_bert(num_labels=4).config)
    dataset = language_rows(EXAMPLES).remove_columns("domain")
    dataset = dataset.map(lambda row: {"labels": [label % 4 if label >= 0 else -100 for label in row["labels"]]})
    found = build(tmp_path, teacher, dataset).rows(torch.tensor([6])).at_temperature(1.0)
    row = dataset[6]
    with torch.no_grad():
        logits = teacher.eval()(torch.tensor([row["input_ids"]])).logits[0]
    expected = logits[torch.tensor(row["labels"]) != -100].log_softmax(-1)
    torch.testing.assert_close(found.log_probabilities, expected.gather(-1, found.ids), atol=1e-3, rtol=0)


def test_gpt2_whose_name_has_no_loss_predicts_the_next():
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    assert TeacherPass(GPT2LMHeadModel(config)).source.shifted
    assert not TeacherPass(tiny_bert()).source.shifted
