"""
Places that results are written to: nothing that is there already, and that this package did not make, is touched.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .recipe_values import RecipeError


# What a trainer leaves in its `output_dir`: a directory with one of these is one of its own
TRAINED = ("training_args.bin", "checkpoint-*")
# What it writes there under names that something else may have
SAVED = ("*.safetensors*", "*config.json", "README.md", "tokenizer*", "chat_template.jinja")


def check_new(output: Path, flag: str = "--output") -> None:
    """
    Raises:
        [`RecipeError`]: there is something at the place of a new file or directory; an empty directory is nothing.
    """
    if not output.name:
        raise RecipeError(f"{flag}: {str(output)!r} is the working directory. Name a new one.")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise RecipeError(
            f"{flag}: {output} is there already, and is not overwritten. Name one that is not there yet, or remove it."
        )


def check_apart(output: Path, inputs: Mapping[str, Path], key: str = "output_dir") -> None:
    """
    Args:
        output (`Path`):
            A directory to write to.
        inputs (`Mapping[str, Path]`):
            Files and directories that are read, by the key that names them.
        key (`str`, *optional*, defaults to `"output_dir"`):
            The key that names `output`.

    Raises:
        [`RecipeError`]: one lies inside the other, so that what is written would become a part of what is read, or overwrite it.
    """
    place = output.expanduser().resolve()
    for name, path in inputs.items():
        source = path.expanduser().resolve()
        if place == source or source in place.parents:
            raise RecipeError(
                f"`{key}`: {output} is {'' if place == source else 'inside '}{path}, which `{name}` names as an input. Name a directory "
                "outside of it, such as runs/my-run."
            )
        if place in source.parents:
            raise RecipeError(
                f"`{key}`: {output} holds {path}, which `{name}` names as an input. Name a directory of its own for what is written, "
                "such as runs/my-run."
            )


def check_trainer_output(output_dir: str | None, model: str) -> None:
    """
    What a trainer writes to (`trl-ext tdpo`): it saves a model, checkpoints and a README.md there.

    Raises:
        [`RecipeError`]: it is empty text, the place of the model that training starts from, or a directory whose files would be overwritten and
        are no earlier training's.
    """
    if output_dir is None:  # TRL's default, a directory of its own
        return
    if not output_dir.strip():
        raise RecipeError("`output_dir` is empty. Name a directory for the model, such as out/my-model.")
    output, start = Path(output_dir), Path(model).expanduser()
    trained = any(any(output.glob(pattern)) for pattern in TRAINED)
    if not output.is_dir() or (trained and output.resolve() != start.resolve()):
        return
    if start.is_dir():
        check_apart(output, {"model_name_or_path": Path(model)})
    found = sorted({path.name for pattern in SAVED for path in output.glob(pattern)})
    if found:
        raise RecipeError(
            f"`output_dir`: {output} holds {', '.join(found[:3])}{', …' if len(found) > 3 else ''}, which no training of this kind made, and "
            "the trained model would overwrite. Name a directory that is empty or not there yet."
        )


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """
    Make a directory that gets its name only when it is whole. What is written goes to the directory that is yielded; if that fails, it is
    removed.

    Args:
        output (`Path`):
            Its name, which [`check_new`] has found free.
    """
    temporary = output.with_name(f".{output.name}.trl-ext-tmp")  # a name that only this function gives
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
