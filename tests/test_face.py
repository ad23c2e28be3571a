"""What ``hf_transfer`` promises is there, documented, and costs nothing until it is used."""

import inspect
import subprocess
import sys

import pytest

import hf_transfer


@pytest.mark.parametrize("name", hf_transfer.__all__)
def test_every_public_name_imports_and_is_documented(name):
    thing = getattr(hf_transfer, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        hf_transfer.NoSuchTrainer  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_transfer; print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
