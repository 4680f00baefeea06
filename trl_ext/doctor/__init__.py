"""
`trl-ext doctor`: find what would go wrong before hours are spent on it.

Without a recipe it checks the installation and the machine; with one, also its keys, data, rendered samples, lengths and memory.
Nothing is trained and no weights are loaded, except for `--start-vllm` and `--probe`.
"""

from collections.abc import Sequence
from pathlib import Path

from ..aries.children import warm_up
from ..recipe import Recipe, RecipeError, apply_overrides, export_env, load_yaml
from . import environment
from .checks import Report


def main(config: Path | None, overrides: Sequence[str], start_vllm: bool, probe: bool) -> int:
    """
    Run the checks and print them as they come.

    Returns:
        `int`: 0 if nothing failed, 1 otherwise.

    Raises:
        [`RecipeError`]: the recipe is not a YAML file, or there are options that need a recipe.
    """
    if config is None and (probe or overrides):
        raise RecipeError(f"`{'--probe' if probe else overrides[0]}` is about a recipe: add `--config RECIPE`.")
    recipe = None if config is None else export_env(load_yaml(config))
    is_aries = recipe is not None and isinstance(recipe.mapping.get("prompts"), dict)
    if is_aries:
        recipe = apply_overrides(recipe, overrides)
        warm_up("trl")  # for the loop's own checks, while the machine is looked at
    report = Report()
    report.heading("Installation")
    for check in (environment.check_python(), *environment.check_packages()):
        report.add(check)
    report.heading("Machine")
    for check in environment.check_machine(output_dir(recipe)):
        report.add(check)
    if start_vllm:
        report.add(environment.check_vllm_starts())
    if is_aries:
        from . import aries_recipe

        report.attempt("recipe", aries_recipe.check, recipe, probe, report)
    elif recipe is not None:
        from . import flat_recipe

        report.attempt("recipe", flat_recipe.check, recipe, overrides, probe, report)
    return report.end()


def output_dir(recipe: Recipe | None) -> Path:
    """The directory of the results; the working directory without a recipe."""
    named = None if recipe is None else recipe.mapping.get("output_dir")
    return Path(named).expanduser() if isinstance(named, str) else Path()
