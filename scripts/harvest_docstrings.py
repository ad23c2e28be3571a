"""The quickstart's text: docstrings of installed libraries, each labelled with the library it belongs to.

    python scripts/harvest_docstrings.py --output out/docstrings

Every machine that can run this project has these texts, so the quickstart needs no download. The label is the library
because there pretrained knowledge pays: what a text is about (graphs, tables, algebra, ...) must be told from a few
examples. Sources are parsed, never imported. What keeps the accuracy honest:

- the split goes by file: no file gives text to two of train, validation and test;
- exact and near copies are dropped over all libraries and splits: half of a text's word triples must be new;
- the libraries' names, aliases and import paths are masked by one and the same word in every text;
- the markup is removed, for reStructuredText and Markdown would tell the libraries apart without reading;
- every library has the same number of texts in a split, and at most `PER_FILE` of them come from one file.

The result depends only on the seed and on the installed versions, which `constraints.txt` pins.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

# Dependencies of this project or of its dependencies, each with a subject of its own. NumPy is left out: it is the
# ground of pandas and SciPy, and its docstrings read like theirs.
LIBRARIES = ("networkx", "pandas", "scipy", "sklearn", "sympy", "torch", "transformers")
# Texts per library. The test split is filled first, so that what is dropped as a copy is the training text.
SPLITS = {"test": 80, "validation": 40, "train": 200}
WORDS = range(12, 61)  # fewer name no subject ("Return the number of elements."), more do not fit into 96 tokens
PER_FILE = 6

OTHER_FOLDER = re.compile(r"_.*|tests?|testing|externals?")  # private code, tests and copies of other libraries
NAME = re.compile(
    r"[\w./-]*(?:networkx|pandas|scipy|scikit|sklearn|sympy|torch|transformers|hugging[ _]?face)[\w/-]*(?:\.\w+)*"
    r"|\b(?:nx|pd|hf|aten)(?:[._]\w+)*\b",
    re.IGNORECASE,
)
MASK = "library"
MARKUP = (
    (re.compile(r":[\w:]+:`~?([^`<]*)(?:<[^`]*)?`"), r"\1"),  # :class:`~module.Name`, :ref:`title <anchor>`
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [title](address)
    (re.compile(r"`_?|\*|\[|\]"), ""),
    (re.compile(r"Read more in the [^.]*\."), ""),  # scikit-learn's signature
)
# Titles, underlines, lists, directives, doctests, addresses, formulas and templates: the prose before them is wanted.
NOT_PROSE = re.compile(r"^\s*(?:[-=~*^#]{3,}|>>>|\.\. |[-*\d.]+ |[\w ]+:$)|https?:|::|[\\{}%|]", re.MULTILINE)


def source_files(library: str) -> list[Path]:
    """The source files of the library's public folders, in a fixed order."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {library!r} is not installed here; run scripts/setup, which installs it.")
    root = Path(spec.submodule_search_locations[0])
    folders = {path: path.relative_to(root).parts[:-1] for path in root.rglob("*.py")}
    return sorted(path for path in folders if not any(map(OTHER_FOLDER.fullmatch, folders[path])))


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module and of its public classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and not getattr(node, "name", "").startswith("_"):
                yield docstring


def description(docstring: str) -> str:
    """The leading paragraphs of prose, as many as fit into `WORDS`, without markup and library names; maybe empty."""
    prose: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        paragraph = paragraph.strip()
        if not re.match(r"[A-Z`:]", paragraph) or not paragraph.endswith(".") or NOT_PROSE.search(paragraph):
            break
        if sum(len(part.split()) for part in [*prose, paragraph]) not in range(WORDS.stop):
            break
        prose.append(paragraph)
    text = " ".join(prose)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(NAME.sub(MASK, text).split())


def word_triples(text: str) -> set[tuple[str, ...]]:
    """The runs of three words, by which near copies are known, whatever their punctuation, numbers and capitals."""
    words = re.findall(r"[a-z]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


class WithoutCopies:
    """Passes on the texts of which more than half of the word triples are new, and counts the others."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, ...]] = set()
        self.dropped = 0

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            triples = word_triples(text)
            if 2 * len(triples - self.seen) > len(triples):
                self.seen |= triples
                yield text
            else:
                self.dropped += 1


def harvest(
    libraries: Iterable[str] = LIBRARIES, *, splits: Mapping[str, int] = SPLITS, seed: int = 0
) -> tuple[dict[str, list[dict[str, str]]], int]:
    """The examples (text, label, source) of every split, and how many copies were dropped on the way.

    Args:
        libraries: the packages to read, which are also the labels.
        splits: the number of examples per library in each split, in the order in which they are filled.
        seed: orders the files, the texts within a file and the examples.
    """
    order = random.Random(seed)
    examples: dict[str, list[dict[str, str]]] = {split: [] for split in splits}
    without_copies = WithoutCopies()
    for library in libraries:
        files = source_files(library)
        order.shuffle(files)
        unread = iter(files)
        for split, wanted in splits.items():
            while wanted:
                path = next(unread, None)
                if path is None:
                    raise SystemExit(f"{library} has too few docstrings: the {split} split needs {wanted} more.")
                texts = list(map(description, docstrings(path.read_bytes())))
                order.shuffle(texts)
                source = library + path.as_posix().rpartition(f"/{library}")[2]
                usable = (text for text in texts if len(text.split()) in WORDS)
                taken = list(islice(without_copies(usable), min(PER_FILE, wanted)))
                examples[split] += [{"text": text, "label": library, "source": source} for text in taken]
                wanted -= len(taken)
    for rows in examples.values():
        order.shuffle(rows)
    return examples, without_copies.dropped


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the docstrings of installed libraries as a labelled data set.")
    parser.add_argument("--output", type=Path, default=Path("out/docstrings"), help="folder for the three jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="orders the files and the texts")
    arguments = parser.parse_args()

    examples, copies = harvest(seed=arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, rows in examples.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        files = len({row["source"] for row in rows})
        print(f"{split:<10} {len(rows):>5} docstrings of {len(LIBRARIES)} libraries, out of {files} files")
    print(f"{copies} copies and near copies dropped; written to {arguments.output}. One of each library:")
    for library in LIBRARIES:
        text = next(row["text"] for row in examples["train"] if row["label"] == library)
        print(f"  {library:<12} {text}")


if __name__ == "__main__":
    main()
