"""The README's examples work: every recipe in it loads, every name it imports is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from hf_transfer.recipe import RECIPES, Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, f"the README has no {language} example"
    return found


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_load(block):
    assert Recipe.from_values(yaml.safe_load(block)).name in block


@pytest.mark.parametrize("block", blocks("python"))
def test_imported_names_are_there(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_table_has_every_recipe():
    assert set(re.findall(r"^\|.*?\| `(\w+)` \|", README, re.MULTILINE)) == set(RECIPES)


def test_scripts_and_pages_are_there():
    for path in re.findall(r"\./(scripts/\w+)", README) + re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path
