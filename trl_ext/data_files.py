"""Local data files, by the suffixes that `datasets` has builders for."""

import os
from pathlib import Path
from typing import Any

from .recipe import RecipeError


# An answer may be "None" or "N/A": only an empty cell is missing
AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}

# Suffix of a local data file -> the builder of `datasets` and its options
BUILDERS = {
    ".jsonl": {"path": "json"},
    ".ndjson": {"path": "json"},
    ".json": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", **AS_WRITTEN},
    ".tsv": {"path": "csv", "sep": "\t", **AS_WRITTEN},
    ".arrow": {"path": "arrow"},
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def data_suffix(path: Path) -> str:
    """The suffix without that of compression: `".jsonl"` for `pairs.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_data_file(name: str) -> bool:
    """
    Whether `name` is a local data file, rather than a directory or a dataset on the Hub.

    Raises:
        [`RecipeError`]: `name` can only be a path, and there is no such file, or its format cannot be read.
    """
    path = Path(name).expanduser()
    suffix = data_suffix(path)
    if os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        if suffix not in BUILDERS:
            raise RecipeError(
                f"{name}: cannot read a `{suffix or path.suffix}` file. Supported: {', '.join(BUILDERS)}, also compressed "
                f"({', '.join(COMPRESSED)})."
            )
        return True
    if not os.path.exists(path) and (suffix in BUILDERS or name.startswith(("/", "./", "../", "~"))):
        raise RecipeError(f"{name}: no such file or directory (working directory: {Path.cwd()}).")
    return False


def source_arguments(name: str) -> dict[str, Any]:
    """
    The arguments of `datasets.load_dataset` for a local data file, which is `data_files`, a directory of data files, or a dataset on the Hub.

    Raises:
        [`RecipeError`]: as in [`is_data_file`]; or the file is empty, on which the builders fail.
    """
    path = Path(name).expanduser()
    if is_data_file(name):
        if path.stat().st_size == 0:
            raise RecipeError(f"{name}: the file is empty.")
        return {**BUILDERS[data_suffix(path)], "data_files": str(path)}
    if os.path.isdir(path):
        suffixes = {data_suffix(file) for file in path.rglob("*")} & BUILDERS.keys()
        return {"path": str(path), **(AS_WRITTEN if suffixes and suffixes <= {".csv", ".tsv"} else {})}
    return {"path": name}
