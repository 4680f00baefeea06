"""
Converts recipes of other projects: alignment-handbook's, axolotl's, LLaMA-Factory's, RLHFlow's, and those of `trl dpo` before TRL 1.

In: a YAML file. Out: a flat recipe for `trl-ext tdpo` or `trl-ext self-refine-dpo`, every change with its reason, and, as
problems, every key without a counterpart, with a fix. Every key that is left out has a line. Comments are lost.
"""

import sys
from pathlib import Path

import yaml

from ..recipe import RecipeError, load_yaml
from .convert import Migration, convert


def main(old: Path, method: str, output: Path | None) -> int:
    """
    Run `trl-ext migrate`: write the new recipe to `output` or stdout, and its account to stderr.

    Returns:
        `int`: the exit code, 0, or 1 if problems are left for the user.

    Raises:
        [`RecipeError`]: the file is not a recipe or is one of a method outside of DPO's family, or `output` exists.
    """
    if output is not None and output.exists():
        raise RecipeError(f"{output} exists already and is not overwritten. Name another file with `--output`.")
    if old.suffix in (".sh", ".py"):
        raise RecipeError(
            f"{old} is a script, not a recipe. In RLHFlow's loops the recipe is the text between `cat <<EOT > dpo_config.yaml` and `EOT`: save "
            "it as a YAML file and migrate that. `trl-ext aries run` replaces the whole loop."
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
    """What was changed, what is left to the user, and the next step."""
    whose = "" if migration.project is None else f"a DPO recipe of {migration.project.name}; "
    lines = [f"{old}: {whose}{len(migration.kept)} keys kept as they are, {len(migration.changes)} changes"]
    lines += [f"  {change}" for change in migration.changes]
    if migration.problems:
        lines.append(f"{len(migration.problems)} left out, for you to settle:")
        lines += [f"  error: {problem}" for problem in migration.problems]
    lines.append("Comments of the old file are lost.")
    if output is not None:
        lines.append(f"Written to {output}. Check it with `trl-ext doctor --config {output}`.")
    return "\n".join(lines)
