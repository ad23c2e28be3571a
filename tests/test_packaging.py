"""What is installed is whole: the declared requirements, the constraints and the built wheel agree with the source."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_transfer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_transfer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
USED = ("quantization", "vision", "audio")


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return specifier.version


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    pins = constraints()
    for name, requirement in requirements(*EXTRAS).items():
        assert requirement.specifier.contains(pinned_version(pins[name])), f"{pins[name]} is not {requirement}"


def test_the_pins_satisfy_each_other_and_miss_nothing():
    """Follows the installed packages' own requirements from ours, as pip does."""
    pins, todo, done = constraints(), list(requirements(*USED, "quickstart").values()), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == "setuptools" or name.startswith("nvidia") or name == "triton":
            continue  # the build's own, and what only some builds of torch bring: torch pins these itself
        assert requirement.specifier.contains(pinned_version(pins[name])), f"{pins[name]} is not {requirement}"
        if name not in done:
            done.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def imported_modules(path: Path) -> set[str]:
    """The top-level packages that a source file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module.partition(".")[0])
    return modules - sys.stdlib_module_names - {"hf_transfer"}


def test_the_package_imports_what_it_declares_and_nothing_else():
    providers = importlib.metadata.packages_distributions()
    modules = {module for path in PACKAGE.rglob("*.py") for module in imported_modules(path)}
    modules -= {"triton"}  # comes with torch where it can be used
    imported = {canonicalize_name(providers[module][0]) for module in modules}
    assert imported - set(requirements(*USED)) == set(), "imported but not declared"
    assert set(requirements()) - imported == set(), "declared but never imported"


def test_the_command_is_there():
    (command,) = PROJECT["scripts"]
    assert command == "hf-transfer"
    app = importlib.metadata.EntryPoint(command, PROJECT["scripts"][command], "console_scripts").load()
    assert callable(app)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist, built by `python -m build` from a copy of what a clone holds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_transfer", "recipes", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=source, capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr
    return source / "dist"


@pytest.mark.slow
def test_the_wheel_is_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = f"hf_transfer_learning-{hf_transfer.__version__}.dist-info"
    source = {path.relative_to(ROOT).as_posix() for pattern in ("*.py", "*.pyi") for path in PACKAGE.rglob(pattern)}
    assert "hf_transfer/py.typed" in names
    assert "hf_transfer/__init__.pyi" in source
    assert source == {name for name in names if name.endswith((".py", ".pyi"))}
    assert {name.split("/")[0] for name in names} == {"hf_transfer", folder}
    assert f"{folder}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_can_run_its_own_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    assert recipes | {"constraints.txt", "scripts/setup", "tests/test_packaging.py", "hf_transfer/py.typed"} <= names


@pytest.mark.slow
def test_the_installed_wheel_works_away_from_its_source(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    installer = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*installer, str(tmp_path / "site"), str(wheel)], check=True)
    code = """
import importlib.metadata, hf_transfer
for name in hf_transfer.__all__:
    getattr(hf_transfer, name)
assert importlib.metadata.version("hf-transfer-learning") == hf_transfer.__version__
print(hf_transfer.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "site")
