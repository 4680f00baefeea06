"""
Checks of the places that results are written to: files that this package did not write are never touched.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .recipe_values import RecipeError


# Files that a trainer leaves in its `output_dir`, by which it is recognised
TRAINED = ("training_args.bin", "checkpoint-*")
# Files it writes there under names that other programs use too
SAVED = ("*.safetensors*", "*config.json", "README.md", "tokenizer*", "chat_template.jinja")


def check_new(output: Path, flag: str = "--output") -> None:
    """
    Raises:
        [`RecipeError`]: the file or directory exists already. An empty directory is accepted.
    """
    if not output.name:
        raise RecipeError(f"{flag}: {str(output)!r} is the working directory. Name a new one.")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise RecipeError(f"{flag}: {output} is there already, and is not overwritten. Name a new one, or remove it.")


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
        [`RecipeError`]: one lies inside the other, so that results would become part of an input, or overwrite it.
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
                f"`{key}`: {output} holds {path}, which `{name}` names as an input. Name a separate directory, "
                "such as runs/my-run."
            )


def check_trainer_output(output_dir: str | None, model: str) -> None:
    """
    Check the directory to which a trainer (`trl-ext tdpo`) saves its model, checkpoints and a README.md.

    Raises:
        [`RecipeError`]: the name is empty, the directory holds the model that training starts from, or its files would be overwritten and
        are not from an earlier training.
    """
    if output_dir is None:  # TRL's default is a new directory
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
            f"`output_dir`: {output} holds {', '.join(found[:3])}{', …' if len(found) > 3 else ''}, which this trainer did not write and "
            "the trained model would overwrite. Name an empty or a new directory."
        )


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """
    Make a directory that gets its name only when it is complete. Write to the directory that is yielded; if that fails, it is
    removed.

    Args:
        output (`Path`):
            Its name; check it with [`check_new`] before.
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
