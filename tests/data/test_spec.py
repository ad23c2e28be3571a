"""From files to tokenised splits: what is read, held out, drawn, refused and reported."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value
from transformers import AutoTokenizer

from hf_transfer.data.spec import DataSpec
from hf_transfer.errors import ConfigurationError
from hf_transfer.schema import construct
from tests.folders import WORDS, write_rows, write_tokenizer

SEQUENCES, TOKENS, LANGUAGE = "sequence-classification", "token-classification", "causal-lm"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An own, empty cache for each test, as HF_HOME would give it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "downloads" / "extracted")
    datasets.disable_progress_bars()
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, max_length=16)
    return AutoTokenizer.from_pretrained(folder)


def rows_of(labels, text="the film was {}"):
    return [{"text": text.format(f"word{row}"), "label": label} for row, label in enumerate(labels)]


def splits_of(train, **others) -> DatasetDict:
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in {"train": train, **others}.items()})


def prepare(raw, tokenizer, *, task=SEQUENCES, **options):
    return DataSpec(path="json", **options).prepare(raw, tokenizer, task=task)


class TestReading:
    def test_a_recipe_section_loads_from_the_recipes_folder(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", [{"sentence": "good", "topic": "a", "id": 1}] * 20)
        write_rows(tmp_path / "test.jsonl", [{"sentence": "bad", "topic": "b", "id": 2}] * 3)
        section = {
            "path": "json",
            "data_files": {"train": "train.jsonl", "test": "test.jsonl"},
            "columns": {"text": "sentence", "label": "topic"},
        }
        raw = construct(DataSpec, section, where="data").load(task=SEQUENCES, base_dir=tmp_path)
        assert {split: len(rows) for split, rows in raw.items()} == {"train": 18, "validation": 2, "test": 3}
        assert raw["test"][0] == {"text": "bad", "label": "b"}

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.tsv", "rows.parquet"])
    def test_formats(self, tmp_path, name):
        rows = rows_of(["x", "y"] * 10)
        file = tmp_path / name
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        elif name.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(file)
        elif name.endswith(".jsonl"):
            write_rows(file, rows)
        else:
            separator = "\t" if name.endswith(".tsv") else ","
            file.write_text("\n".join(separator.join(row) for row in [("text", "label"), *(r.values() for r in rows)]))
        path = {"tsv": "csv", "jsonl": "json", "gz": "json"}.get(file.suffix[1:], file.suffix[1:])
        raw = DataSpec(path=path, data_files=name, validation=0).load(task=SEQUENCES, base_dir=tmp_path)
        assert raw["train"].to_list() == rows

    def test_words_that_look_like_missing_values_are_words(self, tmp_path):
        (tmp_path / "rows.csv").write_text("text,label\nNA,None\nnull,n/a\n")
        raw = DataSpec(path="csv", data_files="rows.csv", validation=0).load(task=SEQUENCES, base_dir=tmp_path)
        assert raw["train"].to_list() == [{"text": "NA", "label": "None"}, {"text": "null", "label": "n/a"}]

    def test_an_empty_field_is_missing(self, tmp_path, tokenizer):
        (tmp_path / "rows.csv").write_text("text,label\na,1\nb,\n")
        data = DataSpec(path="csv", data_files="rows.csv", validation=0)
        with pytest.raises(ConfigurationError, match="'label' of 'train' is missing in 1 of 2 rows"):
            data.prepare(data.load(task=SEQUENCES, base_dir=tmp_path), tokenizer, task=SEQUENCES)

    def test_files_of_a_folder_by_pattern(self, tmp_path):
        (tmp_path / "parts").mkdir()
        for part in "ab":
            write_rows(tmp_path / "parts" / f"{part}.jsonl", rows_of("xy"))
        data = DataSpec(path="json", data_dir="parts", data_files="*.jsonl", validation=0)
        assert len(data.load(task=SEQUENCES, base_dir=tmp_path)["train"]) == 4

    def test_nothing_is_written_beside_the_data(self, tmp_path, tokenizer, cache):
        write_rows(tmp_path / "train.jsonl", rows_of(["x", "y"] * 10))
        data = DataSpec(path="json", data_files="train.jsonl", train_size=4)
        data.prepare(data.load(task=SEQUENCES, base_dir=tmp_path), tokenizer, task=SEQUENCES)
        assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "cache"}
        assert cache.is_dir()

    def test_the_same_data_are_tokenised_once(self, tmp_path, tokenizer):
        write_rows(tmp_path / "train.jsonl", rows_of(["x", "y"] * 10, text="the film {} was very very good and long"))
        data = DataSpec(path="json", data_files="train.jsonl", max_length=6)
        first, again = (
            data.prepare(data.load(task=SEQUENCES, base_dir=tmp_path), tokenizer, task=SEQUENCES) for _ in range(2)
        )
        assert [file["filename"] for file in first.train.cache_files] == [
            file["filename"] for file in again.train.cache_files
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data_files": "trian.jsonl"}, r"trian.jsonl' is not there. Did you mean 'train.jsonl'"),
            ({"data_files": {"train": "train.jsonl", "test": "no/test.jsonl"}}, "nor is its folder"),
            ({"data_files": "*.json"}, r"no file matches '.*\*.json'"),
            ({"data_files": "empty.jsonl"}, r"empty.jsonl' is empty"),
            ({}, "data_files is missing"),
            ({"path": "train.jsonl"}, "files go into data.data_files"),
            ({"data_dir": "nowhere"}, "data_dir: '.*nowhere' is not a folder"),
            ({"data_files": "broken.jsonl"}, "cannot be loaded"),
            ({"data_files": "train.jsonl", "train": "trains"}, "no split 'trains'. Did you mean 'train'"),
            ({"data_files": "train.jsonl", "validation": "dev"}, "data.validation: there is no split 'dev'"),
            ({"data_files": "train.jsonl", "test": "train"}, "data.test = 'train': that is the split to train on"),
            ({"data_files": "train.jsonl", "columns": {"text": "txt"}}, "no column 'txt' .*Did you mean 'text'"),
            ({"data_files": "train.jsonl", "columns": {"tags": "label"}}, "sequence-classification has no 'tags'"),
            ({"data_files": "train.jsonl", "columns": {"text_pair": "b"}}, "no column 'b' to be the text_pair"),
            ({"data_files": "train.jsonl", "validation": 0.001}, "of 20 examples is nothing"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, options, message):
        write_rows(tmp_path / "train.jsonl", rows_of(["x", "y"] * 10))
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "broken.jsonl").write_text('{"text": "a", "label"')
        with pytest.raises(ConfigurationError, match=message):
            DataSpec(**{"path": "json", **options}).load(task=SEQUENCES, base_dir=tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"columns": {"txt": "a"}}, "'txt' is no role. Did you mean 'text'"),
            ({"validation": 1.0}, "validation = 1.0: expected"),
            ({"max_length": 1}, "max_length = 1: expected 2 or more"),
            ({"train_size": 0}, "train_size = 0"),
            ({"delimiter": ""}, "delimiter is empty"),
        ],
    )
    def test_values_that_cannot_work_are_refused_at_once(self, options, message):
        with pytest.raises(ConfigurationError, match=message):
            DataSpec(path="json", **options)


class TestSplitting:
    def load(self, folder: Path, rows, **options):
        write_rows(folder / "rows.jsonl", rows)
        data = DataSpec(path="json", data_files=options.pop("data_files", "rows.jsonl"), **options)
        return data.load(task=SEQUENCES, base_dir=folder)

    def test_a_dev_split_is_the_validation(self, tmp_path):
        write_rows(tmp_path / "dev.jsonl", rows_of("xy", text="dev {}"))
        raw = self.load(tmp_path, rows_of("xyxy"), data_files={"train": "rows.jsonl", "dev": "dev.jsonl"})
        assert raw["validation"]["text"][:] == ["dev word0", "dev word1"]
        assert len(raw["train"]) == 4

    def test_a_share_is_held_out_by_class(self, tmp_path):
        rows = rows_of(["x"] * 70 + ["y"] * 30 + ["z"])
        raw = self.load(tmp_path, rows, validation=0.2)
        assert Counter(raw["validation"]["label"][:]) == {"x": 14, "y": 6}
        assert Counter(raw["train"]["label"][:]) == {"x": 56, "y": 24, "z": 1}, "the only z must stay to be learned"
        texts = raw["train"]["text"][:] + raw["validation"]["text"][:]
        assert sorted(texts) == sorted(row["text"] for row in rows)

    def test_the_seed_alone_decides(self, tmp_path):
        held_out = [self.load(tmp_path, rows_of("xy" * 50), seed=seed)["validation"]["text"][:] for seed in (0, 0, 1)]
        assert held_out[0] == held_out[1] != held_out[2]

    def test_numbers_to_predict_are_held_out_too(self, tmp_path):
        raw = self.load(tmp_path, rows_of([row / 7 for row in range(50)]))
        assert len(raw["validation"]) == 5

    def test_zero_holds_out_nothing(self, tmp_path):
        assert set(self.load(tmp_path, rows_of("xy"), validation=0)) == {"train"}


class TestDrawing:
    def test_draws_are_balanced_and_nested(self, tokenizer):
        raw = splits_of(rows_of(["x"] * 70 + ["y"] * 25 + ["z"] * 5))
        drawn = {}
        for size in (12, 30):
            train = prepare(raw, tokenizer, train_size=size, seed=3).train
            drawn[size] = {tuple(ids) for ids in train["input_ids"][:]}
            counts = Counter(train["labels"][:])
            assert counts == ({0: 4, 1: 4, 2: 4} if size == 12 else {0: 13, 1: 12, 2: 5}), "z has no more than 5"
        assert drawn[12] < drawn[30]

    def test_another_seed_draws_others(self, tokenizer):
        raw = splits_of(rows_of("xy" * 20))
        first, second = (prepare(raw, tokenizer, train_size=6, seed=seed).train["input_ids"][:] for seed in (0, 1))
        assert first != second

    def test_labels_are_those_of_all_of_train(self, tokenizer):
        raw = splits_of(rows_of("abcdef" * 2), test=rows_of("abcdef"))
        prepared = prepare(raw, tokenizer, train_size=3)
        assert prepared.label_names == list("abcdef")
        assert any("train has no example of 3 of 6 labels" in note for note in prepared.notes)

    def test_more_than_there_are(self, tokenizer):
        with pytest.raises(ConfigurationError, match="train_size = 9: 'train' has only 4 examples"):
            prepare(splits_of(rows_of("xyxy")), tokenizer, train_size=9)


class TestUnlabelled:
    def test_its_texts_join_train_without_their_labels(self, tmp_path, tokenizer):
        write_rows(tmp_path / "train.jsonl", rows_of("xy" * 10))
        write_rows(tmp_path / "more.jsonl", [{"text": "a film", "label": "z"}, {"text": "a book", "label": "x"}])
        files = {"train": "train.jsonl", "more": "more.jsonl"}
        data = DataSpec(path="json", data_files=files, validation=0.2, unlabelled="more")
        raw = data.load(task=SEQUENCES, base_dir=tmp_path)
        assert raw["unlabelled"].column_names == ["text"]
        prepared = data.prepare(raw, tokenizer, task=SEQUENCES)
        assert prepared.label_names == ["x", "y"]
        assert prepared.train["labels"][-3:] == [prepared.train["labels"][15], -100, -100]
        assert prepared.train["input_ids"][-1] == tokenizer("a book")["input_ids"]
        assert len(prepared.train) == 18
        assert "unlabelled: 2 examples" in " ".join(prepared.report())

    def test_the_few_drawn_are_labelled_ones(self, tokenizer):
        raw = splits_of(rows_of("xy" * 10), unlabelled=[{"text": "a film"}] * 5)
        labels = prepare(raw, tokenizer, train_size=4, unlabelled="unlabelled").train["labels"][:]
        assert sorted(labels) == [-100] * 5 + [0, 0, 1, 1]

    def test_a_loss_that_would_read_the_missing_labels_is_refused(self, tokenizer):
        raw = splits_of(rows_of([0.5, 1.5]), unlabelled=[{"text": "a film"}])
        with pytest.raises(ConfigurationError, match="unlabelled examples need labelled ones with one class each"):
            prepare(raw, tokenizer, unlabelled="unlabelled")
        with pytest.raises(ConfigurationError, match="causal-lm does not read it"):
            DataSpec(path="json", unlabelled="more").load(task=LANGUAGE)


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "options", "problem_type", "names", "encoded"),
        [
            (["no", "yes", "no"], {}, "single_label_classification", ["no", "yes"], [0, 1, 0]),
            ([3, 10, 3], {}, "single_label_classification", ["3", "10"], [0, 1, 0]),
            ([True, False, True], {}, "single_label_classification", ["False", "True"], [1, 0, 1]),
            ([0.5, 1.0, -2.0], {}, "regression", [], [0.5, 1.0, -2.0]),
            ([1, 2, 5], {"problem_type": "regression"}, "regression", [], [1.0, 2.0, 5.0]),
            (
                [1.0, 2.0, 1.0],
                {"problem_type": "single_label_classification"},
                "single_label_classification",
                ["1", "2"],
                [0, 1, 0],
            ),
            (
                [["b"], ["a", "b"], []],
                {},
                "multi_label_classification",
                ["a", "b"],
                [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]],
            ),
            (
                ["b", "a| b", ""],
                {"delimiter": "|"},
                "multi_label_classification",
                ["a", "b"],
                [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]],
            ),
            (
                [[0, 1], [1, 0], [1, 1]],
                {},
                "multi_label_classification",
                ["0", "1"],
                [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]],
            ),
            ([[7], [7, 2], [2]], {}, "multi_label_classification", ["2", "7"], [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]),
        ],
    )
    def test_kinds(self, tokenizer, labels, options, problem_type, names, encoded):
        prepared = prepare(splits_of(rows_of(labels)), tokenizer, **options)
        assert prepared.problem_type == problem_type
        assert prepared.label_names == names
        assert prepared.train["labels"][:] == encoded

    def test_class_labels_keep_their_order(self, tokenizer):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "mixed", "negative"])})
        raw = DatasetDict({"train": Dataset.from_list(rows_of([0, 2, 2]), features=features)})
        prepared = prepare(raw, tokenizer)
        assert prepared.label_names == ["positive", "mixed", "negative"]
        assert prepared.train["labels"][:] == [0, 2, 2]
        assert prepared.notes == ["note: train has no example of 1 of 3 labels: 'mixed'"]

    @pytest.mark.parametrize(
        ("train", "test", "options", "message"),
        [
            ("xy", "xyz", {}, "'label' of 'test' has 'z' .1 times., which 'train' never shows"),
            ([0, 1], [0, -1], {}, "'label' of 'test' has the id -1 .1 times.*withheld"),
            (["x", None, "y"], "xy", {}, "'label' of 'train' is missing in 1 of 3 rows .first in row 1"),
            ([0.5, float("nan")], [0.5], {}, "missing in 1 of 2 rows"),
            ([0.5, float("inf")], [0.5], {}, "is inf in row 1.*finite"),
            (["x", "y"], ["x"], {"problem_type": "regression"}, "'x' in row 0; regression needs a finite number"),
            ("xx", "x", {}, "always 'x': there is nothing to learn"),
            ([["a"], ["b"]], [["a"]], {"problem_type": "single_label_classification"}, "which is no label for single"),
            ("xy", "xy", {"problem_type": "multi_label_classification"}, "a list, or a text with a delimiter"),
            (
                [0.5, 1.5],
                [0.5],
                {"problem_type": "single_label_classification"},
                "a class is a text or a whole number",
            ),
            ([["a"], ["b", None]], [["a"]], {}, "missing in 1 of 2 rows"),
        ],
    )
    def test_labels_that_cannot_be_learned_are_named(self, tokenizer, train, test, options, message):
        with pytest.raises(ConfigurationError, match=message):
            prepare(splits_of(rows_of(train), test=rows_of(test)), tokenizer, test="test", **options)

    def test_ids_must_mean_the_same_in_every_split(self, tokenizer):
        features = Features({"text": Value("string"), "label": ClassLabel(num_classes=2)})
        train = Dataset.from_list(rows_of([0, 1]), features=features)
        with pytest.raises(ConfigurationError, match="'label' means '0', '1' in 'train', but no names in 'test'"):
            prepare({"train": train, "test": Dataset.from_list(rows_of([0, 2]))}, tokenizer)

    def test_an_id_beyond_the_names(self, tokenizer):
        info = DatasetInfo(features=Features({"text": Value("string"), "label": ClassLabel(num_classes=2)}))
        train = Dataset(pyarrow.table({"text": ["a", "b"], "label": [0, 2]}), info=info)
        with pytest.raises(ConfigurationError, match="has the id 2 .1 times.; expected 0 to 1 .'0', '1'."):
            prepare({"train": train}, tokenizer)

    def test_a_test_split_with_withheld_labels_is_left_out_unless_asked_for(self, tokenizer):
        raw = splits_of(rows_of([0, 1, 0]), test=rows_of([-1, -1]))
        prepared = prepare(raw, tokenizer)
        assert prepared.test is None
        assert "withheld" in prepared.notes[0]
        with pytest.raises(ConfigurationError, match="the id -1"):
            prepare(raw, tokenizer, test="test")


class TestSequences:
    def test_only_inputs_and_labels_are_left(self, tokenizer):
        prepared = prepare(splits_of(rows_of("xy")), tokenizer)
        assert set(prepared.train.column_names) <= {"input_ids", "token_type_ids", "attention_mask", "labels"}
        batch = prepared.collator([prepared.train[0], prepared.train[1]])
        assert batch["input_ids"].shape == (2, 6)
        assert batch["labels"].tolist() == [0, 1]

    def test_pairs(self, tokenizer):
        raw = splits_of([{"text": "good film", "text_pair": "bad book", "label": label} for label in "xy"])
        ids = tokenizer("good film", "bad book")["input_ids"]
        assert prepare(raw, tokenizer).train["input_ids"][:] == [ids, ids]

    def test_what_truncation_costs_is_reported(self, tokenizer):
        texts = [
            "good",
            "the film was very good",
            "the very very very good book was a film",
        ]  # + [CLS], [SEP]: 3, 7, 11
        rows = [{"text": text, "label": label} for text, label in zip(texts, "xyx", strict=True)]
        prepared = prepare(splits_of(rows, test=rows[:1] + rows[:1]), tokenizer, max_length=6)
        summary = prepared.summaries["train"]
        assert (summary.kept, summary.lost, summary.truncated) == (3 + 6 + 6, 1 + 5, 2)
        assert [len(ids) for ids in prepared.train["input_ids"][:]] == [3, 6, 6]
        assert prepared.report()[0] == "train: 3 examples, 15 tokens; 2 lost 6 more (28.6%) at length 6"
        assert prepared.summaries["test"].lost == 0

    def test_test_examples_that_were_trained_on_are_counted(self, tokenizer):
        train = rows_of("xyxy")
        prepared = prepare(splits_of(train, test=[*train[:2], {"text": "new", "label": "x"}]), tokenizer)
        assert prepared.summaries["test"].seen_in_train == 2
        assert any(line.startswith("warning: 2 of 3 test examples occur in train") for line in prepared.report())

    @pytest.mark.parametrize(
        ("raw", "options", "message"),
        [
            (
                splits_of([{"text": " ", "label": 0}, {"text": "a", "label": 1}]),
                {},
                "not a text in 1 of 2 rows.*row 0",
            ),
            (splits_of([{"text": None, "label": 0}, {"text": "a", "label": 1}]), {}, "not a text in 1 of 2 .*None"),
            (splits_of([{"text": 5, "label": 0}]), {}, "not a text in 1 of 1 rows of 'train' .first in row 0: 5"),
            (splits_of([{"txt": "a", "label": 0}]), {}, "'train' has no column 'text'. Did you mean 'txt'"),
            (splits_of(rows_of("xy"), test=[]), {}, "'test' is empty"),
            (splits_of(rows_of("xy"), dev=rows_of("xy")), {}, "found the splits train, dev"),
            ({"test": Dataset.from_list(rows_of("xy"))}, {}, "found the splits test; expected train"),
            (splits_of(rows_of("xy")), {"max_length": 17}, "max_length = 17: the model takes at most 16"),
            (splits_of(rows_of("xy")), {"block_size": 8}, "does not read it. Did you mean data.max_length"),
        ],
    )
    def test_rows_that_cannot_be_used_are_named(self, tokenizer, raw, options, message):
        with pytest.raises(ConfigurationError, match=message):
            prepare(raw, tokenizer, **options)


class TestTags:
    @pytest.fixture
    def pieces(self, tmp_path):
        """A tokenizer that cuts 'goodbad' into good + ##bad."""
        from transformers import BertTokenizer

        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##bad", "##book"]
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
        return BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=16)

    def prepare(self, tokenizer, rows, *, test=None, **options):
        named = [{"tokens": words.split(), "tags": tags.split()} for words, tags in rows]
        others = {} if test is None else {"test": [{"tokens": w.split(), "tags": t.split()} for w, t in test]}
        return prepare(splits_of(named, **others), tokenizer, task=TOKENS, **options)

    def test_only_the_first_piece_of_a_word_is_labelled(self, pieces):
        prepared = self.prepare(pieces, [("the goodbad film", "O B-x I-x")])
        assert pieces.convert_ids_to_tokens(prepared.train[0]["input_ids"]) == [
            "[CLS]", "the", "good", "##bad", "film", "[SEP]",
        ]  # fmt: skip
        assert prepared.train[0]["labels"] == [-100, 0, 1, -100, 2, -100]

    def test_names_start_with_o_and_complete_each_type(self, pieces):
        prepared = self.prepare(pieces, [("the film", "O B-y"), ("film", "B-x")], test=[("film film", "B-x I-x")])
        assert prepared.label_names == ["O", "B-x", "I-x", "B-y", "I-y"]
        assert prepared.problem_type is None

    def test_words_lost_to_truncation_are_counted(self, pieces):
        prepared = self.prepare(pieces, [("goodbad goodbook the film", "B-x O O B-x"), ("film", "O")], max_length=6)
        # [CLS] good ##bad good ##book [SEP]: two of four words
        summary = prepared.summaries["train"]
        assert (summary.kept, summary.lost, summary.truncated) == (3, 2, 1)

    def test_a_batch_pads_labels_with_what_the_loss_ignores(self, pieces):
        prepared = self.prepare(pieces, [("the film", "O B-x"), ("film", "B-x")])
        batch = prepared.collator([prepared.train[0], prepared.train[1]])
        assert batch["labels"].tolist() == [[-100, 0, 1, -100], [-100, 1, -100, -100]]

    def test_class_label_tags(self, pieces):
        features = Features(
            {"tokens": datasets.List(Value("string")), "tags": datasets.List(ClassLabel(names=["O", "B-z", "I-z"]))}
        )
        train = Dataset.from_list([{"tokens": ["the", "film"], "tags": [0, 1]}], features=features)
        test = Dataset.from_list([{"tokens": ["the", "film"], "tags": [1, 2]}], features=features)
        prepared = prepare({"train": train, "test": test}, pieces, task=TOKENS)
        assert prepared.label_names == ["O", "B-z", "I-z"]
        assert prepared.test[0]["labels"] == [-100, 1, 2, -100]

    @pytest.mark.parametrize(
        ("rows", "test", "message"),
        [
            ([("the film", "O")], None, "row 0 of 'train' has 2 words, but tags 1"),
            ([("the film", "O B-x")], [("film", "B-y")], "'tags' of 'test' has 'B-y'"),
            ([("", ""), ("film", "B-x")], None, "'tokens' is not a list of words in 1 of 2 rows"),
        ],
    )
    def test_tags_that_cannot_be_learned_are_named(self, pieces, rows, test, message):
        with pytest.raises(ConfigurationError, match=message):
            self.prepare(pieces, rows, test=test)


class TestLanguage:
    TEXTS = ("the film was good", "a book", "  ", "the plot is very very dull")  # with [CLS] and [SEP]: 6, 4, -, 8

    def prepare(self, tokenizer, texts=TEXTS, **options):
        return prepare(splits_of([{"text": text} for text in texts]), tokenizer, task=LANGUAGE, **options)

    def test_blocks_hold_every_token_once_and_in_order(self, tokenizer):
        prepared = self.prepare(tokenizer, block_size=8)
        joined = [token for text in self.TEXTS if text.strip() for token in tokenizer(text)["input_ids"]]
        rows = prepared.train["input_ids"][:]
        assert [len(row) for row in rows] == [8, 8, 2]
        assert [token for row in rows for token in row] == joined
        assert prepared.train["labels"][:] == rows
        assert prepared.train.column_names == ["input_ids", "labels"]

    def test_a_last_token_with_nothing_to_predict_is_counted_as_lost(self, tokenizer):
        summary = self.prepare(tokenizer, ["the film was", "a film is a"], block_size=5).summaries["train"]  # 5 + 6
        assert (summary.rows, summary.kept, summary.lost) == (2, 10, 1)

    def test_documents_stay_apart_without_packing(self, tokenizer):
        prepared = self.prepare(tokenizer, packing=False, max_length=7)
        assert [len(row) for row in prepared.train["input_ids"][:]] == [6, 4, 7]
        assert prepared.summaries["train"].lost == 1

    def test_an_end_of_text_token_closes_what_the_tokenizer_does_not_mark(self, tmp_path, tokenizer):
        plain = AutoTokenizer.from_pretrained(self.unmarked(tmp_path))
        assert plain("the film")["input_ids"] == tokenizer("the film", add_special_tokens=False)["input_ids"]
        ids = self.prepare(plain, ["the film", "a book"], block_size=6).train[0]["input_ids"]
        assert plain.convert_ids_to_tokens(ids) == ["the", "film", "[SEP]", "a", "book", "[SEP]"]

    def test_a_document_with_nothing_to_predict_is_left_out(self, tmp_path):
        plain = AutoTokenizer.from_pretrained(self.unmarked(tmp_path))
        plain.eos_token = None
        rows = self.prepare(plain, ["film", "the film"], packing=False).train["input_ids"][:]
        assert [len(row) for row in rows] == [2]

    def unmarked(self, folder: Path) -> Path:
        write_tokenizer(folder)
        settings = json.loads((folder / "tokenizer.json").read_text())
        settings["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(settings))
        return folder

    def test_characters_per_token(self, tokenizer):
        summary = self.prepare(tokenizer, ["the film", "a book"], block_size=8).summaries["train"]
        assert summary.characters_per_token == pytest.approx((8 + 6) / (4 + 4))

    @pytest.mark.parametrize(("sample_by", "count"), [("line", 5), ("paragraph", 2), ("document", 1)])
    def test_a_text_file_is_read_by(self, tmp_path, sample_by, count):
        (tmp_path / "corpus.txt").write_text("the film\nwas good\n\na book\nwas bad")
        data = DataSpec(path="text", data_files="corpus.txt", sample_by=sample_by, validation=0)
        texts = data.load(task=LANGUAGE, base_dir=tmp_path)["train"]["text"][:]
        assert len(texts) == count
        if sample_by == "paragraph":
            assert texts == ["the film\nwas good", "a book\nwas bad"], "line ends inside a paragraph are text"

    @pytest.mark.parametrize(
        ("texts", "options", "message"),
        [
            (["", " "], {}, "no text of 'train' is long enough"),
            (["a film"], {"max_length": 8}, "causal-lm with packing does not read it. Did you mean data.block_size"),
            (["a film"], {"block_size": 17}, "block_size = 17: the model takes at most 16"),
            (["a film"], {"packing": False, "block_size": 8}, "Did you mean data.max_length"),
        ],
    )
    def test_what_cannot_be_modelled_is_named(self, tokenizer, texts, options, message):
        with pytest.raises(ConfigurationError, match=message):
            self.prepare(tokenizer, texts, **options)

    def test_a_single_document_cannot_be_divided(self, tmp_path):
        (tmp_path / "corpus.txt").write_text("the film was good")
        with pytest.raises(ConfigurationError, match="0.1: that share of 1 examples is nothing or all.*sample_by"):
            DataSpec(path="text", data_files="corpus.txt").load(task=LANGUAGE, base_dir=tmp_path)


def test_splits_with_other_columns_are_read_one_by_one(tmp_path):
    """A test split with labels beside a training split without them."""
    for name, row in (("train", {"text": "a"}), ("test", {"text": "b", "label": "yes"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = {name: f"{name}.jsonl" for name in ("train", "test")}
    found = DataSpec(path="json", data_files=files).load_unlabelled(task="sequence-classification", base_dir=tmp_path)
    assert {split: rows[:] for split, rows in found.items()} == {
        "unlabelled": {"text": ["a"]},
        "test": {"text": ["b"], "label": ["yes"]},
    }
    with pytest.raises(ConfigurationError, match="'train' has no column 'label'"):
        DataSpec(path="json", data_files=files).load(task="sequence-classification", base_dir=tmp_path)
