"""Shell completion, asked as bash asks it."""

import subprocess
from pathlib import Path

import pytest

from trl_ext.cli import main


ASK = """
source completion.bash
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p trl-ext | sed 's/.*-F \\([^ ]*\\).*/\\1/') trl-ext "${COMP_WORDS[-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    from trl_ext.arguments import ACTIONS, make_parser
    from trl_ext.completion import script

    return {shell: script(make_parser(), shell, ACTIONS) for shell in ("bash", "zsh", "fish", "tcsh")}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a"], {"aries"}),
        (["aries", "rep"], {"report"}),
        (["aries", "run", "--pairs.min_m"], {"--pairs.min_margin"}),
        (["aries", "run", "--training.lear"], {"--training.learning_rate"}),
        (["aries", "refine", "--refinements.str"], {"--refinements.strategy"}),
        (["aries", "refine", "--prompts.sp"], {"--prompts.split"}),
        (["aries", "export", "--pu"], {"--push_to_hub"}),
        (["tdpo", "--lora_r"], {"--lora_r"}),
        (["tdpo", "--accelerate_c"], {"--accelerate_config"}),
        (["self-refine-dpo", "--refinement_w"], {"--refinement_weight"}),
        (["aries", "run", "--config", "my_rec"], {"my_recipe.yaml"}),
        (["aries", "status", "my_"], {"my_recipe.yaml", "my_run"}),
        (["aries", "compare", "my_run", "my_ru"], {"my_run"}),
        (["aries", "list", "my_"], {"my_run"}),
    ],
)
def test_bash_completes(scripts, tmp_path, words, found):
    Path(tmp_path / "completion.bash").write_text(scripts["bash"])
    Path(tmp_path / "my_recipe.yaml").write_text("")
    Path(tmp_path / "my_run").mkdir()
    done = subprocess.run(["bash", "-c", ASK, "ask", "trl-ext", *words], cwd=tmp_path, capture_output=True, text=True)
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_the_same_commands(scripts, shell):
    assert all(name in scripts[shell] for name in ("self-refine-dpo", "export", "learning_rate"))


def test_the_command_prints_it(scripts, capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == scripts["bash"] + "\n"
