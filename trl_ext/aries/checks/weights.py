"""
Checks of weights on disk before they are loaded: safetensors only, since loading a pickle may run code; and adapters that fit their base.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...model_files import PICKLES, broken_weights, folder_problem


def weights_problem(name: str) -> str | None:
    """
    Why a local directory is not a model to start from, or `None`. A model on the Hub is not checked here, but loaded with
    `use_safetensors=True`.
    """
    path = Path(name)
    if not path.is_dir():
        return folder_problem(name)
    files = {file.name for file in path.iterdir()}
    if "adapter_config.json" in files and "config.json" not in files:
        base = _adapter_config(path).get("base_model_name_or_path")
        return (
            f"{name} is a PEFT adapter on {base}, not a model. Merge it (`trl-ext aries export`, or PEFT's `merge_and_unload`) and name "
            "the merged model."
        )
    return _no_safetensors(path, "model") or broken_weights(path)


def _no_safetensors(path: Path, kind: str) -> str | None:
    files = sorted(file.name for file in path.iterdir())
    if any(file.endswith(".safetensors") for file in files):
        return None
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        return (
            f"{path} has its weights only as a pickle ({', '.join(pickles)}), and loading one may run code. If you trust it, load the "
            f"{kind} in Python and save it with `save_pretrained`, which writes safetensors."
        )
    return f"{path} has no weights: no *.safetensors among {', '.join(files) or 'no files'}."


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def adapter_problem(path: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> str | None:
    """
    Why an adapter that a run made does not fit its base, or `None`. `shapes` are those of the base's weights by module, `(out, in)`, and
    `rank` is the recipe's `lora_r`.
    """
    problem = _no_safetensors(path, "adapter")
    if problem:
        return problem
    try:
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        return f"{path}/adapter_model.safetensors cannot be read ({error})."
    for key, shape in found.items():
        module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):
            continue
        if module not in shapes:
            return f"{path} has weights for {module}, which the model does not have. It was trained on another model."
        out_features, in_features = shapes[module]
        expected = (rank, in_features) if part == "lora_A" else (out_features, rank)
        if shape != expected:
            return f"{path} does not fit the model: {module}.{part} is {shape}, and the model and `model.lora_r: {rank}` need {expected}."
    return None
