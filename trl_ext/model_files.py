"""
Checks of a model's directory before anything is loaded from it: does it exist, and are its weights complete?
"""

import difflib
import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


INDEX = "model.safetensors.index.json"
# Suffixes of files that `torch.load` reads
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def folder_problem(name: str) -> str | None:
    """
    The error for a model's name that can only be a path to a missing folder, with the nearest existing one; `None` if the folder exists, or
    if the name may be one on the Hub (which has at most one slash).
    """
    path = Path(name).expanduser()
    if path.is_dir() or not (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/")):
        return None
    if path.exists():
        return f"{name} is a file, not a model's folder."
    return f"no such folder: {name}.{_did_you_mean(path) or f' The working directory is {Path.cwd()}.'}"


def load_problem(name: str, error: Exception) -> str:
    """The error for a model whose configuration or tokenizer did not load. A misspelt folder is named first, before the Hub's own message."""
    path = Path(name).expanduser()
    if path.is_dir():
        return f"the config or the tokenizer of {name} cannot be read: {error}"
    meant = _did_you_mean(path)
    if meant or (path.parent != Path() and path.parent.is_dir()):
        return f"no such folder: {name}.{meant} It was not found on the Hub either, or the Hub cannot be reached."
    return f"{name} cannot be read: there is no folder of this name here, and the Hub says: {error}"


def _did_you_mean(path: Path) -> str:
    """ " Did you mean ...?" with the existing directory whose name is nearest to the first wrong part of a path; empty if there is none."""
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    wrong, *rest = path.absolute().relative_to(existing).parts
    try:
        names = [entry.name for entry in existing.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    for match in difflib.get_close_matches(wrong, names, n=3):
        meant = existing.joinpath(match, *rest)
        if meant.is_dir():
            shown = (
                meant if path.is_absolute() or not meant.is_relative_to(Path.cwd()) else meant.relative_to(Path.cwd())
            )
            return f" Did you mean {shown}?"
    return ""


def model_files(path: Path) -> list[Path]:
    """The files that a model is loaded from: those of its directory that are neither hidden nor pickles."""
    return [file for file in path.iterdir() if file.is_file() and not _left_out(file)]


def _left_out(file: Path) -> bool:
    return file.name.startswith(".") or file.suffix in PICKLES


def broken_weights(path: Path) -> str | None:
    """
    What is wrong with the weights in a directory, `None` if they are complete: a file that is cut off, since its header promises more than
    there is, or a shard or a tensor that the index names and that is missing. No tensor is read. Files other than safetensors and zip
    archives (PyTorch's format since 1.6) are not checked.
    """
    named: dict[str, set[str]] = {}  # file -> its tensors, according to the index
    if (path / INDEX).is_file():
        try:
            for tensor, file in json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
                named.setdefault(file, set()).add(tensor)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return f"{path / INDEX} cannot be read ({error})."
    safetensors = sorted({path / file for file in named} or path.glob("*.safetensors"))
    for file in safetensors:
        if not file.is_file():
            return f"{file} is missing, although {INDEX} names it. {AGAIN}"
        try:
            with safe_open(file, "np") as opened:
                keys = set(opened.keys())
        except (OSError, SafetensorError) as error:
            return f"{file} is cut off or damaged: it has {file.stat().st_size:,} bytes, and its header does not fit them ({error}). {AGAIN}"
        missing = sorted(named.get(file.name, set()) - keys)
        if missing:
            return f"{file} lacks {missing[0]} and {len(missing) - 1:,} more tensors that {INDEX} says it has. {AGAIN}"
    for file in sorted(path.glob("*.bin")) if not safetensors else ():
        with open(file, "rb") as opened:
            zipped = opened.read(2) == b"PK"
        if zipped and not zipfile.is_zipfile(file):  # whose directory is at its end
            return f"{file} is cut off: its {file.stat().st_size:,} bytes end too early. {AGAIN}"
    return None


AGAIN = "Copy or download the model again."
