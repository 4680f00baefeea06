"""
Who may import whom, read from the source: the imports of every module of `trl_ext`, those inside functions and under
`TYPE_CHECKING` included. Oracle: STYLE.md, "Arrows point one way".
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import trl

import trl_ext


PACKAGE = Path(trl_ext.__file__).parent

# Part of the package -> the parts it may import. `recipe`, `recipe_checks` and `recipe_values` are at the bottom, beside `losses`: they
# turn YAML into dataclasses and know no trainer; `processes` knows nothing of what runs in them.
MAY_IMPORT = {
    "processes": set(),
    "fork_server": {"processes"},
    "import_bitsandbytes": set(),
    "arguments": set(),
    "recipe_values": set(),
    "recipe_checks": {"recipe_values"},
    "recipe": {"recipe_checks", "recipe_values"},
    "outputs": {"recipe_values"},
    "model_files": set(),
    "launch": {"recipe"},
    "terminal": set(),
    "losses": set(),
    "kernels": set(),
    "rows": {"recipe_values"},
    "trainers": {"losses", "kernels", "rows"},
    "data_files": {"recipe"},
    "aries": {
        *(
            "data_files",
            "processes",
            "fork_server",
            "launch",
            "terminal",
            "recipe",
            "recipe_checks",
            "recipe_values",
            "losses",
            "kernels",
            "rows",
        ),
        *("trainers", "outputs", "model_files"),
    },
    "scripts": {
        *("data_files", "processes", "terminal", "recipe", "recipe_values", "losses", "kernels", "rows", "trainers"),
        *("outputs", "model_files"),
    },
    "new_task": {"outputs"},
    "migrate": {"recipe", "recipe_values", "rows", "trainers"},
    "doctor": {
        *("processes", "launch", "recipe", "recipe_values", "kernels", "rows", "trainers", "aries", "scripts"),
        "model_files",
    },
    "cli": {
        *(
            "processes",
            "terminal",
            "recipe",
            "recipe_values",
            "losses",
            "kernels",
            "rows",
            "trainers",
            "aries",
            "scripts",
        ),
        *("arguments", "doctor", "migrate", "launch", "completion", "new_task"),
    },
    "completion": {"recipe_values", "trainers", "aries"},
    "__init__": {"trainers", "aries"},  # the public names, lazily
}


def modules() -> list[str]:
    """Every module, as its path in the package."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(module: str) -> list[tuple[str, str | None]]:
    """
    `(module, name)` of each import of a module: `from torch.nn import functional` is `("torch.nn", "functional")`, `import
    torch` is `("torch", None)`, and relative imports are made absolute.
    """
    package = ["trl_ext", *Path(module).parent.parts]
    found = []
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            found += [(source, alias.name) for alias in node.names]
    return found


def part(module: str) -> str:
    """`kernels/position_kl.py` is in part `kernels`, `cli.py` in part `cli`."""
    return Path(module).parts[0].removesuffix(".py")


def imported_part(source: str, name: str | None) -> str | None:
    """The part of the package that an import names, or None for another package and for `trl_ext` itself."""
    root, *rest = source.split(".")
    if root != "trl_ext":
        return None
    if rest:
        return rest[0]
    # `from .. import TDPOConfig` is an import of the module that defines it
    public = trl_ext._PUBLIC.get(name)
    return public.split(".")[1] if public else (name if name in MAY_IMPORT else None)


def is_private_to_trl(source: str, name: str | None) -> bool:
    """Whether an import reaches past what `trl` itself exports."""
    return source.startswith("trl.") and name not in trl.__all__


def test_import_reader():
    """The reader of this file, on a module whose imports are known."""
    found = imports("trainers/tdpo_trainer.py")
    assert ("trl_ext.losses.shifts", "tdpo_shifts") in found
    assert ("trl_ext.trainers.tdpo_config", "TDPOConfig") in found
    assert ("datasets", "Dataset") in found
    assert imported_part("trl_ext", "TDPOConfig") == "trainers"
    assert imported_part("trl_ext", "recipe") == "recipe"
    assert is_private_to_trl("trl.trainer.utils", "use_adapter")
    assert not is_private_to_trl("trl", "DPOConfig")


def test_every_part_has_a_place():
    assert {part(module) for module in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", modules())
def test_dependencies_point_one_way(module):
    """losses, kernels <- trainers <- aries, scripts <- cli."""
    here = part(module)
    others = {imported_part(*imported) for imported in imports(module)} - {None, here}
    assert others <= MAY_IMPORT[here], f"{module} imports {sorted(others - MAY_IMPORT[here])}"


@pytest.mark.parametrize("module", [module for module in modules() if part(module) == "losses"])
def test_losses_import_torch_and_nothing_else(module):
    roots = {source.split(".")[0] for source, _ in imports(module)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "trl_ext"}


def test_vllm_is_imported_by_the_engine_and_the_reward_model_only():
    """vLLM's two runners, each in a child process of its own: generation, and pooling, which shares no code with it."""
    assert [m for m in modules() if any(source.split(".")[0] == "vllm" for source, _ in imports(m))] == [
        "aries/generation/embedded_engine.py",
        "aries/scoring/reward_model.py",
    ]


@pytest.mark.parametrize("module", [module for module in modules() if part(module) not in ("trainers", "kernels")])
def test_trl_is_used_by_its_exported_names(module):
    """What TRL does not export is used under trainers/ and kernels/ only, and listed in `test_trl_contract.py`."""
    assert [imported for imported in imports(module) if is_private_to_trl(*imported)] == []


def test_importing_trl_ext_is_cheap():
    """`import trl_ext` loads neither torch nor a library on top of it, and still lists its public names."""
    code = (
        "import sys, trl_ext; print(*sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)));"
        "print(*dir(trl_ext))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, names = result.stdout.split("\n")[:2]
    assert heavy == ""
    assert {"TDPOConfig", "TDPOTrainer", "SelfRefineDPOConfig", "SelfRefineDPOTrainer"} <= set(names.split())


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="GRPOTrainer"):
        _ = trl_ext.GRPOTrainer


# The rooms of `aries`, in the order in which they may import one another: what a round reads and writes, then what it does
ROOMS = [
    *(
        "children",
        "config",
        "data",
        "run_dir",
        "policies",
        "provenance",
        "generation",
        "training",
        "scoring",
        "checks",
    ),
    *("inputs", "manifest", "results", "stages", "rounds"),
]


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("aries/")])
def test_rooms_of_aries_import_the_rooms_before_them(module):
    """Each module imports from its own room and from those before it in [`ROOMS`], so there is no circle."""
    room = Path(module).parts[1].removesuffix(".py")
    if room == "__init__":
        return
    found = [".".join([source, *([name] if source == "trl_ext.aries" else [])]) for source, name in imports(module)]
    others = {source.split(".")[2] for source in found if source.startswith("trl_ext.aries.")} - {room}
    assert others <= set(ROOMS[: ROOMS.index(room)]), f"{module} imports {sorted(others)}"


def test_few_files_are_at_the_top_of_aries():
    assert len(list((PACKAGE / "aries").glob("*.py"))) <= 11


@pytest.mark.parametrize("module", modules())
def test_no_private_name_is_imported_from_another_module(module):
    """`_x` belongs to its module. What TRL does not export has its own test."""
    own = [(source, name) for source, name in imports(module) if source.split(".")[0] == "trl_ext"]
    assert [(source, name) for source, name in own if name and name.startswith("_") and name != "__version__"] == []
