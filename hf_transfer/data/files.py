"""`datasets.load_dataset` for recipes: relative paths start from one folder, and absent files are named beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from datasets import DatasetDict

DataFiles = str | list[str] | dict[str, str | list[str]]

MEDIA_FOLDERS = {"imagefolder": "image", "audiofolder": "audio"}
FILE_FORMATS = ("json", "csv", "parquet", "text", *MEDIA_FOLDERS)
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


def read_dataset(
    path: str, *, base_dir: Path, data_dir: str | None = None, data_files: DataFiles | None = None, **options: Any
) -> DatasetDict:
    """Load all splits of a Hub data set, of a folder, or of files of one format.

    Args:
        path: A Hub id, a folder, or one of `FILE_FORMATS`.
        base_dir: What relative paths start from.
        data_dir: A folder of data files, for a file format.
        data_files: As `datasets.load_dataset` takes them.
        options: More arguments of `datasets.load_dataset`, those of the format included.

    Raises:
        ConfigurationError: A file or folder is not there, or reading failed.
    """
    import datasets

    folder = base_dir / Path(path).expanduser()
    if path in FILE_FORMATS:
        if data_files is None and data_dir is None:
            raise ConfigurationError(f"data.data_files is missing: path '{path}' is a format, so it needs files.")
        folder = base_dir / Path(data_dir or "").expanduser()
        if not folder.is_dir():
            raise ConfigurationError(f"data.data_dir: '{folder}' is not a folder.")
        data_dir = data_dir and str(folder.absolute())
        data_files = data_files and _find_files(data_files, folder)
        if path == "csv":
            options |= {"keep_default_na": False, "na_values": ["", "nan", "NaN"]}  # "None" and "NA" are words
            if data_files and all(_suffix(file) == ".tsv" for file in _flatten(data_files)):
                options["sep"] = "\t"
    elif folder.is_dir():
        path = str(folder.absolute())
    elif _suffix(path) in SUFFIXES:
        raise ConfigurationError(
            f"data.path = '{path}': expected a Hub id, a folder or a format ({', '.join(FILE_FORMATS)}); "
            "files go into data.data_files."
        )
    if path in MEDIA_FOLDERS:
        options |= _folder_of_files(path, data_dir)
    try:
        return datasets.load_dataset(path, data_dir=data_dir, data_files=data_files, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if (
            isinstance(error.__cause__, datasets.table.CastError)
            and isinstance(data_files, dict)
            and len(data_files) > 1
        ):
            alone = {"base_dir": base_dir, "data_dir": data_dir, **options}  # one split has columns that others lack
            parts = (read_dataset(path, data_files={split: some}, **alone) for split, some in data_files.items())
            return datasets.DatasetDict({split: rows for part in parts for split, rows in part.items()})
        hint = ""
        if "torchcodec" in str(error.__cause__):
            hint = " A folder of sounds needs none as path: audiofolder with data_dir."
        raise ConfigurationError(f"data: '{path}' cannot be loaded: {error.__cause__ or error}{hint}") from error


def _folder_of_files(path: str, data_dir: str | None) -> dict[str, Any]:
    """What a folder of classes is read with: paths (as Audio they would need torchcodec), and labels that files beside
    the classes lack."""
    from datasets import Features, Value

    tables = Path(data_dir).rglob("metadata.*") if data_dir else ()
    metadata = next((file for file in tables if file.suffix in SUFFIXES), None)
    if metadata is not None and path == "imagefolder":
        return {}
    if metadata is not None:
        raise ConfigurationError(
            f"data.path = '{path}': '{metadata}' is a table of sounds. Read it as one: path: csv (or json), "
            "data_files, columns: {audio: file_name}."
        )
    return {"features": Features({MEDIA_FOLDERS[path]: Value("string"), "label": Value("string")})}


def _find_files(files: Any, folder: Path) -> Any:
    """The same files as absolute paths; URLs stay as they are, and a pattern must match something."""
    if isinstance(files, dict):
        return {split: _find_files(some, folder) for split, some in files.items()}
    if isinstance(files, list):
        return [_find_files(file, folder) for file in files]
    return files if "://" in files else str(_existing(folder / Path(files).expanduser()).absolute())


def _existing(path: Path) -> Path:
    if has_magic(str(path)):
        if not glob(str(path), recursive=True):
            raise ConfigurationError(f"data.data_files: no file matches '{path}'.")
    elif not path.parent.is_dir():
        raise ConfigurationError(f"data.data_files: '{path}' is not there, nor is its folder.")
    elif not path.is_file():
        there = [other.name for other in path.parent.iterdir() if other.is_file()]
        raise ConfigurationError(f"data.data_files: '{path}' is not there. {nearest(path.name, there)}")
    elif not path.stat().st_size:
        raise ConfigurationError(f"data.data_files: '{path}' is empty.")
    return path


def _flatten(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield files
    else:
        for some in files.values() if isinstance(files, dict) else files:
            yield from _flatten(some)


def _suffix(file: str) -> str:
    return Path(file.removesuffix(".gz")).suffix
