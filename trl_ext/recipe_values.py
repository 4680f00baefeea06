"""
The words for what is wrong with a recipe, and the values that no recipe may hold: secrets, and what no file can keep.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any


# Keys that `trl-ext` itself reads and hands to `accelerate launch`; the launcher's other options belong in the accelerate config
LAUNCH_KEYS = (
    "accelerate_config",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
)

# Keys of earlier TRL, transformers and alignment-handbook recipes, and what takes their place
_DATASETS = "list the data under `datasets:`, each with `path` and, if needed, `name`, `split`, `columns`, `fraction`"
_RENAMED = {
    "torch_dtype": "it is called `dtype` now",
    "warmup_ratio": "use `warmup_steps`: below 1 it is a fraction of all steps, so `warmup_ratio: 0.1` is `warmup_steps: 0.1`",
    "max_prompt_length": "it is gone: `max_length` bounds prompt and answer together",
    "max_completion_length": "it is gone: `max_length` bounds prompt and answer together",
    "dataset_mixer": _DATASETS,
    "dataset_mixture": _DATASETS,
    "dataset_splits": "use `dataset_train_split` and `dataset_test_split`",
    "evaluation_strategy": "it is called `eval_strategy` now",
    "overwrite_output_dir": "it is gone: remove it",
    "preprocessing_num_workers": "it is called `dataset_num_proc` now",
    "no_cuda": "it is called `use_cpu` now",
    "logging_dir": "it is gone: trackers take their directory from their own environment variables, under `env:`",
}
_RENAMED_IN_DATASETS = {
    "id": "it is called `path` now",
    "config": "it is called `name` now",
    "weight": "slice the split, `split: train[:50%]`; TRL's `fraction` is another thing, a share of the whole mixture",
}

# Access tokens of Hugging Face, and of OpenAI and the servers that imitate it
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}")
# Endings of keys that hold a secret; `eos_token` and `pad_token` do not
_SECRET_KEYS = ("api_key", "hub_token", "hf_token", "auth_token", "access_token", "secret_key", "_secret", "_password")

# What YAML reads as true or false unless it is in quotes
SWITCHES = ("true", "false", "yes", "no", "on", "off")

# Size of the largest accepted integer
_MOST_BITS = 1024


class RecipeError(ValueError):
    """Bad input: a recipe, a flag or a data file. The message is for the user; the CLI prints it without traceback."""


def show(value: Any) -> str:
    """A value in words, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python may refuse to print it
        return f"a number of {value.bit_length():,} bits"
    kind = {str: "the text ", list: "the list ", dict: "the mapping "}.get(type(value), "")
    shown = repr(value) if isinstance(value, (str, int, float, list, dict)) else str(value)
    return kind + (shown if len(shown) <= 80 else shown[:77] + "...")


def unknown_key(key: Any, known: Iterable[str], keys: tuple = (), flag: bool = False) -> str:
    """What to say of an unknown key or flag: the section it is in, and its new name or the closest known one."""
    renamed = _RENAMED_IN_DATASETS if keys[:1] == ("datasets",) else _RENAMED
    kind, dashes = ("flag", "--") if flag else ("key", "")
    message = f"unknown {kind} `{dashes}{key}`" + (f" in `{dotted(keys)}`" if keys else "")
    if key in renamed:
        return f"{message}: {renamed[key]}."
    if flag and key in LAUNCH_KEYS:
        return (
            f"{message}: it is for `trl-ext`, which starts `accelerate launch`; here, give it to `accelerate launch`."
        )
    return f"{message}.{did_you_mean(key, known, dashes)}"


def did_you_mean(name: Any, known: Iterable, prefix: str = "") -> str:
    close = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" Did you mean `{prefix}{close[0]}`?" if close else ""


def dotted(keys: tuple) -> str:
    """`("datasets", 0, "path")` as `datasets[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


# Values that no recipe may hold


def leaves(value: Any, keys: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The values of a tree of mappings and lists, each with its keys."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*keys, key))
    else:
        yield keys, value


def unwritable(value: Any) -> str | None:
    """Why a value, or one inside it, cannot be used, or cannot be written to a file and read again; or `None`."""
    if isinstance(value, dict):
        return next(filter(None, map(unwritable, (*value, *value.values()))), None)
    if isinstance(value, (list, tuple, set)):
        return next(filter(None, map(unwritable, value)), None)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        return "a text with a NUL character or half a Unicode character, which no file can hold. Remove it."
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number; found {value}. Write a number, or leave the key out."
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of more than {_MOST_BITS} bits. Write a smaller one."
    return None


def is_secret(keys: tuple, value: str) -> bool:
    """
    Whether a text at these keys is a secret, by the form of a token or by its name. For variables under `env`, the last word of the name
    counts: `HF_TOKEN` is one, `TOKENIZERS_PARALLELISM` and `HF_TOKEN_PATH` are not.
    """
    if _TOKEN.fullmatch(value):
        return True
    if value.lower() in ("0", "1", *SWITCHES):  # HF_HUB_DISABLE_IMPLICIT_TOKEN
        return False
    name = str(next((key for key in reversed(keys) if not isinstance(key, int)), "")).lower()
    if keys[0] == "env":
        return name.rpartition("_")[2] in ("token", "secret", "password", "passwd", "key", "apikey")
    return name in ("token", "secret", "password") or name.endswith(_SECRET_KEYS)
