"""A model's directory before it is loaded. Oracles: files that safetensors and torch wrote, whole and cut off at every kind of place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trl_ext.model_files import broken_weights, folder_problem, load_problem, model_files


def write_shards(path: Path) -> None:
    path.mkdir()
    for name in "ab":
        save_file({name: torch.ones(64)}, path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_whole_weights(tmp_path):
    write_shards(tmp_path / "shards")
    assert broken_weights(tmp_path / "shards") is None
    torch.save({"a": torch.ones(64)}, tmp_path / "pytorch_model.bin")
    assert broken_weights(tmp_path) is None


@pytest.mark.parametrize("size", [0, 4, 20, -100, -1])
def test_a_file_that_is_cut_off(tmp_path, size):
    """Nothing, in the length of the header, in the header, in the tensors, before the last byte."""
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    cut(tmp_path / "model.safetensors", size)
    assert "model.safetensors is cut off or damaged: it has " in broken_weights(tmp_path)


def test_what_the_index_names(tmp_path):
    path = tmp_path / "shards"
    write_shards(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["c"] = "b.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors lacks c and 0 more tensors" in broken_weights(path)
    (path / "b.safetensors").unlink()
    assert "b.safetensors is missing" in broken_weights(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    assert "index.json cannot be read" in broken_weights(path)


def test_a_pickle_that_is_cut_off(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(64)}, file)
    cut(file, -50)
    assert "pytorch_model.bin is cut off" in broken_weights(tmp_path)
    file.write_bytes(b"an older format")  # which says nothing of its length
    assert broken_weights(tmp_path) is None


def test_what_a_model_is_loaded_from(tmp_path):
    for name in (
        ".cache/a",
        "original/b.pth",
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        ".gitattributes",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(path.name for path in model_files(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_misspelt_folder(tmp_path, monkeypatch):
    (tmp_path / "models/gemma-3").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert folder_problem("./models/gema-3") == "no such folder: ./models/gema-3. Did you mean models/gemma-3?"
    assert folder_problem("./modles/gemma-3").endswith("Did you mean models/gemma-3?")
    assert folder_problem(str(tmp_path / "models/gemma3")).endswith(f"Did you mean {tmp_path}/models/gemma-3?")
    assert folder_problem("a/b/c") == f"no such folder: a/b/c. The working directory is {tmp_path}."
    assert folder_problem("./file") == "./file is a file, not a model's folder."
    for name in ("models/gemma-3", "org/model", "gpt2"):
        assert folder_problem(name) is None
    error = OSError("We couldn't connect to 'https://huggingface.co'")
    for name, meant in (("models/gema-3", "models/gemma-3"), ("model", "models")):
        found = load_problem(name, error)
        assert found.startswith(f"no such folder: {name}. Did you mean {meant}?") and "connect" not in found
    assert load_problem("models/llama", error).startswith("no such folder: models/llama.")
    found = load_problem("org/model", error)
    assert found.startswith("org/model cannot be read: ") and "couldn't connect" in found
    assert "cannot be read: " in load_problem("models/gemma-3", error)
