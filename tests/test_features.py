"""Features are what the head reads, computed once; a replayed prefix trains what an ordinary one would."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import default_data_collator

from hf_transfer.depth import parameter_depths
from hf_transfer.errors import ConfigurationError
from hf_transfer.features import PrefixCache, extract_features
from tests.test_cuts import FAMILIES
from tests.tiny import collate, text_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

INPUTS = ["input_ids", "attention_mask"]


def bert() -> nn.Module:
    return FAMILIES["bert"].make().train()


def extract(model, folder, rows=None, **options):
    options = {"data_collator": collate, "dtype": "float32", "batch_size": 5, **options}
    return extract_features(model, rows or small_rows(), cache_dir=folder, **options)


def small_rows(count: int = 17, **options) -> Dataset:
    """Within the vocabulary of ``FAMILIES``."""
    rows = text_rows(count, labels=2, **options).remove_columns("domain")
    return rows.map(lambda row: {"input_ids": [token % 47 + 3 for token in row["input_ids"]]})


def one_by_one(model: nn.Module, rows: Dataset, run=lambda model, batch: model(**batch).logits) -> torch.Tensor:
    """Without batches there is neither padding nor an order to get wrong."""
    inputs = [name for name in rows.column_names if name not in ("labels", "example_index")]
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [run(model, {name: torch.tensor([row[name]]) for name in inputs}) for row in rows]
    model.train(training)
    return torch.cat(found)


HEADS = {
    "bert": lambda model, features: model.classifier(features),
    "roberta": lambda model, features: model.classifier(features.unsqueeze(1)),
    "electra": lambda model, features: model.classifier(features.unsqueeze(1)),
    "distilbert": lambda model, features: model.classifier(model.pre_classifier(features).relu()),
    "deberta": lambda model, features: model.classifier(model.pooler(features.unsqueeze(1))),
    "llama": lambda model, features: model.score(features),
    "qwen3": lambda model, features: model.score(features),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_on_the_features_is_the_model(name, tmp_path):
    model = FAMILIES[name].make()
    features = extract(model, tmp_path)
    model.eval()
    torch.testing.assert_close(HEADS[name](model, features), one_by_one(model, small_rows()), atol=1e-5, rtol=1e-5)


def test_images(tmp_path):
    model = FAMILIES["vit"].make()
    rows = Dataset.from_dict({"pixel_values": torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))})
    features = extract(model, tmp_path, rows, data_collator=default_data_collator)
    torch.testing.assert_close(model.classifier(features), one_by_one(model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_of_the_last_hidden_states(pooling, tmp_path):
    pool = {
        "mean": lambda states: states.mean(1),
        "first": lambda states: states[:, 0],
        "last": lambda states: states[:, -1],
    }
    model = bert()
    expected = one_by_one(
        model, small_rows(), lambda model, batch: pool[pooling](model.bert(**batch).last_hidden_state)
    )
    for bare in (model, model.bert):
        found = extract(bare, tmp_path / type(bare).__name__, pooling=pooling)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_model_is_left_as_it_was(dtype, tmp_path):
    model = bert()
    model.bert.embeddings.eval()
    model.bert.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)

    def state():
        modes = [module.training for module in model.modules()]
        return modes, [(p.dtype, p.requires_grad, p.grad is None, p.sum().item()) for p in model.parameters()]

    before = state()
    features = extract(model, tmp_path, dtype=dtype)
    assert state() == before
    assert not any(vars(module).get("forward") or module._forward_pre_hooks for module in model.modules())
    assert features.dtype in (torch.bfloat16, torch.float32)
    assert dtype == "auto" or features.dtype == getattr(torch, dtype)
    torch.testing.assert_close(features.float(), extract(model, tmp_path / "exact"), atol=0.03, rtol=0.03)


def refuse_to_run(*_):
    raise AssertionError("the model ran")


def test_the_second_call_reads_the_file(tmp_path):
    model = bert()
    features = extract(model, tmp_path)
    model.bert.embeddings.register_forward_pre_hook(refuse_to_run)
    assert torch.equal(extract(model, tmp_path), features)
    with pytest.raises(AssertionError, match="the model ran"):
        extract(model, tmp_path / "elsewhere")


def change_weight(model, rows):
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] += 1e-6


def change_config(model, rows):
    model.config.layer_norm_eps *= 2


def change_buffer(model, rows):
    model.bert.embeddings.position_ids += 1


def change_head(model, rows):
    nn.init.normal_(model.classifier.weight)


def change_labels_seen(model, rows):
    """The first labelled pass writes the problem's type into the configuration."""
    model(**collate(rows.to_list()[:4]))


CHANGES = [change_weight, change_config, change_buffer]
KEPT = [change_head, change_labels_seen]


@pytest.mark.parametrize("change", [*CHANGES, *KEPT])
def test_what_a_changed_model_meets(change, tmp_path):
    model, rows = bert(), small_rows()
    extract(model, tmp_path, rows)
    change(model, rows)
    extract(model, tmp_path, rows)
    assert len(list(tmp_path.iterdir())) == (2 if change in CHANGES else 1)


def longer_by_padding(rows):
    return {
        name: nn.functional.pad(value, (0, 2)) if value.dim() == 2 else value for name, value in collate(rows).items()
    }


def test_what_changed_data_or_options_meet(tmp_path):
    rows = small_rows()
    changed = rows.to_list()
    changed[11]["input_ids"][2] += 1
    variants = [
        {},
        {"rows": rows.select(range(16, -1, -1))},
        {"rows": Dataset.from_list(changed)},
        {"data_collator": longer_by_padding},
        {"pooling": "mean"},
        {"dtype": "bfloat16"},
    ]
    for files, variant in enumerate(variants, start=1):
        for _ in range(2):
            extract(bert(), tmp_path, **variant)
        assert len(list(tmp_path.iterdir())) == files
    relabelled = rows.remove_columns("labels").add_column("labels", [1] * len(rows))
    for same in (Dataset.from_list(rows.to_list()), rows.with_format("torch"), relabelled):
        extract(bert(), tmp_path, rows=same, batch_size=3)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_lora_is_part_of_the_base(tmp_path):
    def adapted(alpha):
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False, lora_alpha=alpha)
        return get_peft_model(bert(), config)

    features = [extract(model, tmp_path) for model in (bert(), adapted(8), adapted(16))]
    assert len(list(tmp_path.iterdir())) == 3
    model = adapted(16)
    with model.disable_adapter():
        assert torch.equal(extract(model, tmp_path), features[0])
    assert len(list(tmp_path.iterdir())) == 4
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    extract(model, tmp_path)
    model.set_adapter("default")
    assert torch.equal(extract(model, tmp_path), features[2])
    classifier = model.base_model.model.classifier
    torch.testing.assert_close(classifier(features[2]), one_by_one(model, small_rows()), atol=1e-5, rtol=1e-5)


def test_batches_are_of_one_length(tmp_path):
    """So little padding is computed: at most what the longest of each batch of sorted examples makes necessary."""
    rows, widths = small_rows(64), []

    def watched(examples):
        batch = collate(examples)
        if len(examples) == 8:
            widths.append(batch["input_ids"].shape[1])
        return batch

    extract(bert(), tmp_path, rows, data_collator=watched, batch_size=8)
    lengths = sorted(len(tokens) for tokens in rows["input_ids"])
    assert widths == [lengths[last] for last in range(7, 64, 8)]


def random_mask(rows):
    batch = collate(rows)
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.5] = 4
    return batch


REFUSED = {
    "unknown '.*meen'.*'mean'": {"pooling": "meen"},
    "unknown 'float61'.*'float16'": {"dtype": "float61"},
    "different batches of the same examples": {"data_collator": random_mask},
    "found list": {"rows": [{"input_ids": [1, 2]}]},
    "transform of your own set on the fly": {"rows": small_rows().with_transform(lambda batch: batch)},
    "expected a column 'input_ids'.*tokens": {"rows": small_rows().rename_column("input_ids", "tokens")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        extract(bert(), tmp_path / "none", **REFUSED[message])
    assert not (tmp_path / "none").exists()


def test_a_head_that_reads_every_token_has_no_features(tmp_path):
    with pytest.raises(ConfigurationError, match="BertForTokenClassification reads every token.*PrefixCache"):
        extract(FAMILIES["bert-tokens"].make(), tmp_path)


def numbered(rows: Dataset) -> Dataset:
    return rows.add_column("example_index", list(range(len(rows))))


def build(model, folder, rows=None, *, cuts=range(4), dtype="float32", **options):
    rows = rows or numbered(small_rows())
    return PrefixCache.build(model, rows, collate, directory=folder, cuts=cuts, dtype=dtype, batch_size=5, **options)


def training_gradients(model, depth, batch, cache=None):
    """With everything at ``depth`` and below frozen and in eval mode, as without dropout."""
    depths = parameter_depths(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(depths[name] > depth)
    model.eval()
    model.zero_grad()
    if cache is None:
        loss = model(**{name: value for name, value in batch.items() if name != "example_index"}).loss
    else:
        with cache.replay(batch):
            assert "example_index" not in batch
            loss = model(**batch).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", ["bert", "llama", "deberta"])
def test_gradients_on_any_batch_of_the_data(name, dtype, tolerance, tmp_path):
    model, rows = FAMILIES[name].make(), numbered(small_rows())
    cache = build(model, tmp_path, rows, dtype=dtype)
    for depth in (3, 0, 2, 1):
        cache.install(depth)
        for chosen in ([9, 2, 16, 4], [3], [3, 3, 0]):
            batch = collate([rows[index] for index in chosen])
            expected = training_gradients(model, depth, batch)
            found = training_gradients(model, depth, batch, cache)
            assert (found - expected).norm() <= tolerance * expected.norm()
    cache.uninstall()


def test_the_data_pass_through_the_model_once(tmp_path):
    model, seen = bert(), []
    model.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    build(model, tmp_path)
    assert [size for size in seen if size != 4] == [5, 5, 5, 2]  # but for the four examples of the trial
    assert len(list(tmp_path.iterdir())) == 4


def test_a_run_that_resumes_finds_the_cuts_below_what_it_trained(tmp_path):
    model = bert()
    build(model, tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight += 0.1
    build(model, tmp_path, cuts=[0, 1])
    assert {path.name for path in tmp_path.iterdir()} == first
    build(model, tmp_path)
    new = {path.name for path in tmp_path.iterdir()} - first
    assert sorted(name.rpartition("-")[0] for name in new) == ["cut-2", "cut-3"]


def test_only_real_tokens_are_stored(tmp_path):
    rows = small_rows()
    build(bert(), tmp_path, cuts=[1], dtype="bfloat16")
    tokens = sum(map(len, rows["input_ids"]))
    size = next(tmp_path.iterdir()).stat().st_size
    assert size == tokens * 16 * 2 + len(rows) * 16 + 1024


def test_uninstalled_a_replay_is_an_ordinary_pass(tmp_path):
    model, rows = bert(), numbered(small_rows())
    cache = build(model, tmp_path, rows)
    cache.install(3)
    cache.uninstall()
    batch = collate([rows[index] for index in (1, 5)])
    assert torch.equal(training_gradients(model, -1, batch), training_gradients(model, -1, batch, cache))
    assert not any("forward" in vars(module) for module in model.modules())


def test_wrong_cuts_and_batches_are_refused(tmp_path):
    model, rows = bert(), numbered(small_rows())
    with pytest.raises(ConfigurationError, match="cuts: found depth 4, expected 0 .* to 3"):
        build(model, tmp_path, rows, cuts=[4])
    cache = build(model, tmp_path, rows, cuts=[2])
    with pytest.raises(ConfigurationError, match="depth: 1 is not among the cuts"):
        cache.install(1)
    cache.install(2)
    batch = collate([rows[0], rows[1]])
    with (
        pytest.raises(ConfigurationError, match="real tokens where the cached examples"),
        cache.replay({**batch, "example_index": torch.tensor([0, 5])}),
    ):
        pass
    del batch["example_index"]
    with pytest.raises(ConfigurationError, match="no column 'example_index'.*input_ids"), cache.replay(batch):
        pass
