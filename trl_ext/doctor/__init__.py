"""
`trl-ext doctor`: what would go wrong, before hours are spent on it.

Without a recipe it looks at the installation and the machine; with one, also at its keys, data, rendered samples, lengths and
memory. Nothing is trained and no weights are loaded, unless `--start-vllm` or `--probe` ask for it.
"""

from collections.abc import Sequence
from pathlib import Path

from ..aries.children import warm_up
from ..recipe import Recipe, RecipeError, apply_overrides, export_env, load_yaml
from . import environment
from .checks import Check, Report


def main(config: Path | None, overrides: Sequence[str], start_vllm: bool, probe: bool) -> int:
    """
    Run the checks and print them as they come.

    Returns:
        `int`: 0 where nothing failed, 1 otherwise.

    Raises:
        [`RecipeError`]: the recipe is no YAML file, or options are given that need one.
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
    report.add(environment.check_python())
    for check in environment.check_packages():
        report.add(check)
    report.heading("Machine")
    for check in environment.check_devices():
        report.add(check)
    report.add(environment.check_memory())
    report.add(environment.check_disk(output_dir(recipe)))
    report.add(environment.check_bitsandbytes())
    report.add(environment.check_vllm_imports())
    if start_vllm:
        report.add(environment.check_vllm_starts())
    if recipe is not None:
        check_recipe(recipe, overrides, is_aries, probe, report)
    return report.end()


def check_recipe(recipe: Recipe, overrides: Sequence[str], is_aries: bool, probe: bool, report: Report) -> None:
    """The recipe's own checks. Bad input is a failed check, and what depends on it is left out."""
    if is_aries:
        from .aries_recipe import check
    else:
        from .flat_recipe import check
    if is_aries:
        report.attempt("recipe", check, recipe, probe, report)
    else:
        report.attempt("recipe", check, recipe, overrides, probe, report)


def output_dir(recipe: Recipe | None) -> Path:
    """Where results go; the working directory without a recipe."""
    named = None if recipe is None else recipe.mapping.get("output_dir")
    return Path(named).expanduser() if isinstance(named, str) else Path()
