"""What is written and where it may not go. Oracle: the user's files, byte for byte."""

from pathlib import Path

import pytest

from trl_ext.outputs import check_new, check_trainer_output, new_directory
from trl_ext.recipe import RecipeError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_new_means_new():
    Path("file").touch()
    Path("full/file").mkdir(parents=True)
    Path("dangling").symlink_to("nowhere")
    for name in ("file", "full", "dangling"):
        with pytest.raises(RecipeError, match=f"^--output: {name} is there already"):
            check_new(Path(name))
    with pytest.raises(RecipeError, match="^--output: '.' is the working directory"):
        check_new(Path(""))
    Path("empty").mkdir()
    check_new(Path("empty"))
    check_new(Path("new"))


def test_a_directory_has_its_name_only_when_it_is_whole():
    Path("out.tmp").mkdir()
    Path("out.tmp/mine").touch()
    with pytest.raises(RuntimeError), new_directory(Path("out")) as directory:
        (directory / "half").touch()
        raise RuntimeError
    assert [str(path) for path in Path().rglob("*")] == ["out.tmp", "out.tmp/mine"]
    Path("out").mkdir()
    with new_directory(Path("out")) as directory:
        (directory / "whole").touch()
    assert sorted(map(str, Path().rglob("*"))) == ["out", "out.tmp", "out.tmp/mine", "out/whole"]


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        (" ", "`output_dir` is empty"),
        ("model", "`output_dir`: model is model, which `model_name_or_path` names as an input"),
        ("model/new", None),
        ("around", "`output_dir`: around holds around/model, which `model_name_or_path`"),
        ("notes", "`output_dir`: notes holds README.md"),
        ("logs", None),
        ("trained", None),
        ("new", None),
    ],
)
def test_where_a_trainer_may_save(output_dir, message):
    """A trainer's own results may be trained over, as in TRL, and files that no save overwrites may lie beside them."""
    for file in (
        *("model/config.json", "around/model/config.json", "notes/README.md", "logs/train.log", "trained/README.md"),
        "trained/training_args.bin",
    ):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    model = "around/model" if output_dir == "around" else "model"
    if message is None:
        check_trainer_output(output_dir, model)
        if Path(output_dir).is_dir():
            with pytest.raises(RecipeError, match="which `model_name_or_path` names as an input"):
                check_trainer_output(output_dir, output_dir)  # an earlier training's, to start from
    else:
        with pytest.raises(RecipeError, match=message):
            check_trainer_output(output_dir, model)
