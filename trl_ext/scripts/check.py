"""
Parses the arguments of a training once before it is launched, so that an error appears once: `python -m trl_ext.scripts.check tdpo
--config recipe.yaml`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from .preference import exit_code


def check(argv: Sequence[str]) -> None:
    """
    Raises:
        [`RecipeError`]: an argument is not accepted.
    """
    name, *arguments = argv
    import_module(f".{name}", __package__).parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(check, sys.argv[1:]))
