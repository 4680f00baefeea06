"""
Recipes of others become current ones: alignment-handbook's, axolotl's, LLaMA-Factory's, RLHFlow's, and those of `trl dpo` from before TRL 1.

In: a YAML file. Out: a flat recipe for `trl-ext tdpo` or `trl-ext self-refine-dpo`, every change with its reason, and, as
problems, every key that has no counterpart, with the way out. Nothing is dropped without a line. Comments are not carried over.
"""

import sys
from pathlib import Path

import yaml

from ..recipe import RecipeError, load_yaml
from .convert import Migration, convert


def main(old: Path, method: str, output: Path | None) -> int:
    """
    `trl-ext migrate`: the new recipe to `output` or stdout, the account of it to stderr.

    Returns:
        `int`: 0, or 1 where there are problems left for the user.

    Raises:
        [`RecipeError`]: not a recipe, a recipe of another method than DPO's family, or `output` exists.
    """
    if output is not None and output.exists():
        raise RecipeError(f"{output} exists already, and is not overwritten. Name another file with `--output`.")
    if old.suffix in (".sh", ".py"):
        raise RecipeError(
            f"{old}: a script, not a recipe. In RLHFlow's loops the recipe is the text between `cat <<EOT > dpo_config.yaml` and `EOT`: save "
            "it as a YAML file and migrate that. What such a loop does, `trl-ext aries run` does with one recipe."
        )
    migration = convert(load_yaml(old), old.read_text(encoding="utf-8"), method)
    text = f"# Made from {old.name} by `trl-ext migrate`. Run it with `trl-ext {method} --config ...`.\n"
    text += yaml.safe_dump(migration.recipe, sort_keys=False, allow_unicode=True, width=120)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    print(account(old, migration, output), file=sys.stderr)  # noqa: T201
    return 1 if migration.problems else 0


def account(old: Path, migration: Migration, output: Path | None) -> str:
    """What was changed, what is left to the user, and what comes next."""
    whose = "" if migration.project is None else f"a DPO recipe of {migration.project.name}; "
    lines = [f"{old}: {whose}{len(migration.kept)} keys kept as they are, {len(migration.changes)} changes"]
    lines += [f"  {change}" for change in migration.changes]
    if migration.problems:
        lines.append(f"{len(migration.problems)} left out, yours to settle:")
        lines += [f"  error: {problem}" for problem in migration.problems]
    lines.append("Comments of the old file are not carried over.")
    if output is not None:
        lines.append(f"Written to {output}. Look at it with `trl-ext doctor --config {output}`.")
    return "\n".join(lines)
