"""Data files on this machine, by the suffixes that `datasets` has builders for."""

import os
from pathlib import Path

from .recipe import RecipeError


# Suffix of a local data file -> builder of `datasets`
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def is_data_file(name: str) -> bool:
    """
    Whether `name` is a local data file, rather than a directory or a dataset on the Hub.

    Raises:
        [`RecipeError`]: it can only be a path, and leads nowhere, or to a file that nothing here reads.
    """
    path = Path(name).expanduser()
    if os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        if path.suffix not in BUILDERS:
            raise RecipeError(f"{name}: cannot read a `{path.suffix}` file; known are {', '.join(BUILDERS)}.")
        return True
    if not os.path.exists(path) and (path.suffix in BUILDERS or name.startswith(("/", "./", "../", "~"))):
        raise RecipeError(f"{name}: no such file or directory (working directory: {Path.cwd()}).")
    return False


def builder_arguments(name: str) -> dict[str, str]:
    """
    What `datasets.load_dataset` takes for a local data file.

    Raises:
        [`RecipeError`]: the file is empty, which the builders do not expect.
    """
    path = Path(name).expanduser()
    if path.stat().st_size == 0:
        raise RecipeError(f"{name}: the file is empty.")
    return {"path": BUILDERS[path.suffix], "data_files": str(path)}
