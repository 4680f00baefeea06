"""
How training is launched: the accelerate configuration that a recipe names, and the arguments of `accelerate launch`.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .recipe import Recipe, RecipeError


@dataclass
class Launch:
    """
    A training through `accelerate launch`.

    Args:
        config_file (`str`):
            An accelerate configuration.
        num_processes (`int`, *optional*):
            How many processes to start. Default: as many as the configuration says.
    """

    config_file: str
    num_processes: int | None = None

    def command(self, module: str, *arguments: str) -> list[str]:
        """The launcher's module, and its arguments."""
        count = [] if self.num_processes is None else ["--num_processes", str(self.num_processes)]
        launcher = ["accelerate.commands.launch", "--quiet", "--config_file", self.config_file, *count]
        return [*launcher, "--module", module, *arguments]


def recipe_launch(recipe: Recipe) -> Launch | None:
    """The launch that `training.accelerate_config` of an ARIES recipe asks for; `None` for one process."""
    training = recipe.mapping["training"] or {}
    if training.get("accelerate_config") is None:
        return None
    try:
        config_file = find_accelerate_config(training["accelerate_config"], recipe)
    except RecipeError as error:
        raise RecipeError(f"{recipe.where('training', 'accelerate_config')}: `training`: {error}") from error
    return Launch(str(config_file), training.get("num_processes"))


def find_accelerate_config(name: str, recipe: Recipe) -> Path:
    """
    Find an accelerate configuration: a path, or the name of a file in an `accelerate_configs` directory above the recipe, in this
    repository's recipes, or among those that TRL ships.

    Raises:
        [`RecipeError`]: there is no such file, and no configuration of this name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    around = [] if recipe.path is None else recipe.path.resolve().parents
    roots = [*around, Path.cwd() / "recipes", Path(__file__).parents[1] / "recipes"]
    directories = [root / "accelerate_configs" for root in roots]
    directories.append(Path(find_spec("trl").origin).parent / "accelerate_configs")
    found = {path.stem: path for directory in reversed(directories) for path in sorted(directory.glob("*.yaml"))}
    if name not in found:
        raise RecipeError(
            f"accelerate_config: {name} is neither a file nor one of {', '.join(sorted(found))}. Write one with "
            "`accelerate config --config_file my_machine.yaml`."
        )
    return found[name]
