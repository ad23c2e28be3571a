"""The quickstart's text: real, masked, balanced, and without a leak from one split into another."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import harvest_docstrings
import pytest
from harvest_docstrings import LIBRARIES, NAME, WORDS, WithoutCopies, description, docstrings, harvest, word_triples

SMALL = {"test": 10, "validation": 4, "train": 20}


@pytest.fixture(scope="module")
def harvested():
    examples, _ = harvest(splits=SMALL)
    return examples


def test_every_library_has_the_same_share_of_every_split(harvested):
    for split, rows in harvested.items():
        assert Counter(row["label"] for row in rows) == dict.fromkeys(LIBRARIES, SMALL[split])


def test_no_file_is_in_two_splits(harvested):
    sources = {split: {row["source"] for row in rows} for split, rows in harvested.items()}
    assert all(first.isdisjoint(second) for first, second in combinations(sources.values(), 2))


def test_no_text_is_near_another(harvested):
    triples = [word_triples(row["text"]) for rows in harvested.values() for row in rows]
    for first, second in combinations(triples, 2):
        assert 2 * len(first & second) < len(first | second)


def test_texts_are_prose_of_the_right_length_that_names_no_library(harvested):
    texts = [row["text"] for rows in harvested.values() for row in rows]
    for text in texts:
        assert len(text.split()) in WORDS
        assert not NAME.search(text)
        assert not set("`*[]{}\\|") & set(text)


def test_the_harvest_is_the_same_in_another_process(harvested):
    code = f"import json; from harvest_docstrings import harvest; print(json.dumps(harvest(splits={SMALL})[0]))"
    scripts = Path(harvest_docstrings.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(scripts), "PYTHONHASHSEED": "7"}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    digests = [hashlib.sha256(text.strip().encode()).hexdigest() for text in (again.stdout, json.dumps(harvested))]
    assert digests[0] == digests[1]


def test_another_seed_harvests_other_texts(harvested):
    other, _ = harvest(["networkx"], splits={"test": SMALL["test"]}, seed=1)
    assert {row["text"] for row in other["test"]} != {
        row["text"] for row in harvested["test"] if row["label"] == "networkx"
    }


def test_a_library_is_read_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "explosive"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    for index, word in enumerate(words):
        text = " ".join(f"{word}{other}" for other in words)
        (package / f"module{index}.py").write_text(f'"""A{text}."""\nraise RuntimeError("imported")\n')
    monkeypatch.syspath_prepend(tmp_path)
    examples, _ = harvest(["explosive"], splits={"test": 3, "train": 9})
    assert [len(rows) for rows in examples.values()] == [3, 9]
    with pytest.raises(SystemExit, match="explosive has too few docstrings: the train split needs 1 more"):
        harvest(["explosive"], splits={"test": 3, "train": 10})
    with pytest.raises(SystemExit, match="'no_such_library' is not installed"):
        harvest(["no_such_library"])


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Reads a :class:`~pandas.DataFrame`, see `torch.nn.Linear`.", "Reads a library, see library."),
        ("PyTorch and scikit-learn, `sklearn.svm` and nx.Graph.", "library and library, library and library."),
        ("First.\n\nSecond [`Tokenizer`].\n\nArgs:\n    x: left out.", "First. Second Tokenizer."),
        ("Prose.\n\nParameters\n----------\nx : int", "Prose."),
        ("Prose.\n\n>>> doctest()\nresult.", "Prose."),
        ("Fits.\n\nRead more in the :ref:`User Guide <svm>`.\n\n.. versionadded:: 1.0.", "Fits."),
        ("no capital, no prose.", ""),
    ],
)
def test_descriptions_are_the_leading_prose_without_markup_and_names(docstring, expected):
    assert description(docstring) == expected


def test_docstrings_of_private_things_are_left_out():
    source = b'''"""Module."""
class A:
    """Class."""
    def _b(self):
        """Private."""
def c():
    """Function."""
'''
    assert sorted(docstrings(source)) == ["Class.", "Function.", "Module."]


def test_near_copies_are_dropped_and_counted():
    without_copies = WithoutCopies()
    texts = [
        "The configuration of a large model of images and of text.",
        "The configuration of a LARGE model, of images and of text!",
        "The configuration of a small model of images and of text.",
        "Solves a system of linear equations by elimination.",
    ]
    assert list(without_copies(texts)) == [texts[0], texts[3]]
    assert without_copies.dropped == 2
