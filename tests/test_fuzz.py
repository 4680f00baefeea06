"""
Whatever stands in a recipe, a data file, an answer or a template: the only error is the project's own, and no file is left under
its final name that was not written whole. Examples are made by hypothesis, the same ones in every run.
"""

import json
import re
from typing import get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.aries.tiny_run import MINIMAL
from trl_ext.aries.config import LOOP_KEYS, AriesConfig, DatasetConfig
from trl_ext.aries.data.prompts import load_prompts
from trl_ext.aries.data.records import read_jsonl, recover_jsonl, to_line, write_jsonl
from trl_ext.aries.data.templates import compile_template, refinement_prompt
from trl_ext.aries.generation.refinements import find_answer
from trl_ext.recipe import Recipe, RecipeError, apply_overrides, load_yaml, parse_section


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# Values as JSON and YAML have them, with what is nearly one of another kind
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(
        ["5e-7", "no", "null", "~", "1:30", "2026-02-30", "0x1F", ".inf", "{{", "%", "a\0", "\ud800", "chain"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

RECIPE = {
    **MINIMAL,
    "sft": {"dataset": "sft.jsonl"},
    "generation": {"answer_pattern": "(.*)"},
    "refinements": {"strategy": "few_shot"},
}
SECTIONS = {
    name: list(getattr(hint, "__dataclass_fields__", {}))
    for name, hint in get_type_hints(AriesConfig).items()
    if name != "_"
} | {
    "model": ["model_name_or_path", "lora_r", "use_peft"],
    "sft": ["dataset"],
    "training": list(LOOP_KEYS),
}
# A key of the recipe, or of one of its sections
places = st.sampled_from(
    [(name,) for name in SECTIONS] + [(name, key) for name, keys in SECTIONS.items() for key in keys]
)


TEMPLATE_PARTS = (
    "{{ question }} {{ draft }} {% for d in drafts %} {% endfor %} {{ d }} {{ draft.x }} {{ draft.__class__ }} {{ 1/0 }} {{ %} {% "
    "{% if draft %} {% else %} {% endif %} {{ drafts[9] }} {{ draft|nope }} {{ draft|length }} {% include draft %} {{ draft() }} "
    "{% import 'os' as os %} {% raw %} {# #} {{ critique }} {{ range(turn) }} {% set draft = 1 %} {% macro draft() %} {% endmacro %}"
)
TEMPLATE_PARTS = re.findall(r"\{[{%#].*?[%#}]\}|\{\{|%\}|\{%", TEMPLATE_PARTS)


class TestRecipes:
    @given(text=st.text())
    @example("a: !!python/object/apply:os.system [echo]")
    @example("a: !!int x")
    @example("a: !!bool maybe")
    @example("a: !!timestamp x")
    @example("a: 2026-02-30")
    @example("&a [*a]")
    @example("a: &a {b: *a}")
    @example("? [a, b]\n: c")
    @example("!!timestamp x: 1")
    @example("[" * 5000)
    @example("x: " + "9" * 5000)
    @example("x: 0x" + "f" * 5000)
    @example("<<: 5")
    @example("<<: [{a: 1}, 5]")
    @example("a: =")
    @example("--- 1\n--- 2")
    def test_text(self, directory, text):
        file = directory / "recipe.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        self.parse(file)

    @given(content=st.binary(max_size=64))
    def test_bytes(self, directory, content):
        file = directory / "recipe.yaml"
        file.write_bytes(content)
        self.parse(file)

    @given(place=places, value=values)
    def test_any_value_at_any_key(self, directory, place, value):
        """What is accepted can be written down and read back the same."""
        recipe = {name: dict(section) if isinstance(section, dict) else section for name, section in RECIPE.items()}
        if len(place) == 1:
            recipe[place[0]] = value
        else:
            recipe[place[0]] = {**recipe.get(place[0], {}), place[1]: value}
        try:
            parse_section(Recipe(None, recipe, {}), AriesConfig)
        except RecipeError as error:
            assert str(error)

    @given(flag=st.text(), value=st.text())
    @example("--seed", "[!!bool maybe]")
    @example("--seed", "\x00")
    @example("--seed", "2026-02-30")
    @example("--a.b", "'\\")
    def test_overrides(self, flag, value):
        try:
            recipe = apply_overrides(Recipe(None, {"training": {"beta": 0.1}}, {}), [flag, value])
            json.dumps(recipe.mapping, default=str).encode()
        except RecipeError:
            pass

    def test_aliases_of_aliases(self, directory):
        """A billion values in ten lines, which would fill the memory before the first check."""
        lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        (directory / "recipe.yaml").write_text("\n".join(lines))
        with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: more than 10,000 values.*aliases"):
            load_yaml(directory / "recipe.yaml")

    @staticmethod
    def parse(file):
        try:
            parse_section(load_yaml(file), AriesConfig)
        except RecipeError as error:
            assert str(error)


# Lines that are nearly JSON
json_lines = st.one_of(
    values.map(lambda value: json.dumps(value, default=str).encode()),
    st.dictionaries(st.sampled_from(["prompt", "solution", "prompt_id"]), values).map(
        lambda row: json.dumps(row).encode()
    ),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | scalars, "content": scalars}),
        max_size=2,
    ).map(lambda messages: json.dumps({"prompt": messages}).encode()),
    st.binary(max_size=20),
    st.sampled_from(
        [b"[" * 100_000, b"1" * 5000, b'{"prompt": "\\ud800"}', b'{"a": 1', b"\xef\xbb\xbf{}", b"", b"NaN"]
    ),
)


class TestData:
    @given(lines=st.lists(json_lines, max_size=4), torn=st.booleans())
    def test_prompts(self, directory, lines, torn):
        """Rows that are accepted can be written, and read back as they were."""
        file, copy = directory / "prompts.jsonl", directory / "copy.jsonl"
        file.write_bytes(b"\n".join(lines) + (b"" if torn else b"\n"))
        copy.unlink(missing_ok=True)
        try:
            rows = load_prompts([DatasetConfig(str(file))], "prompts.dataset")
        except RecipeError as error:
            assert "prompts.jsonl" in str(error)
            return
        write_jsonl(copy, rows)
        assert [to_line(row) for row in read_jsonl(copy)] == [to_line(row) for row in rows]

    @given(lines=st.lists(json_lines, max_size=4), torn=st.binary(max_size=10))
    def test_a_file_that_was_being_appended_to(self, directory, lines, torn):
        """What is recovered is what is in the file then; the torn end is gone, unless a line before it is no row."""
        part = directory / "answers.jsonl.part"
        part.write_bytes(b"".join(line + b"\n" for line in lines) + torn.replace(b"\n", b""))
        try:
            rows = list(recover_jsonl(part))
        except RecipeError as error:
            assert re.search(r"answers.jsonl.part:\d+: ", str(error))
            return
        assert [to_line(row) for row in read_jsonl(part)] == [to_line(row) for row in rows]

    @given(rows=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=3))
    def test_no_partial_file_under_a_final_name(self, directory, rows):
        """Rows that cannot be encoded fail the write: then there is no file, and otherwise it is whole."""
        file = directory / "rows.jsonl"
        file.unlink(missing_ok=True)
        try:
            write_jsonl(file, rows)
        except UnicodeEncodeError:
            assert not file.exists()
        else:
            assert file.read_text(encoding="utf-8").count("\n") == len(rows)


class TestTexts:
    @pytest.mark.filterwarnings(
        "ignore:Possible (nested set|set):FutureWarning"
    )  # Python's, of a pattern such as `[[`
    @given(
        pattern=st.text(alphabet=st.sampled_from("ab()[]{}.*+?|\\\\^$<>=!:,019P")), text=st.text(alphabet="ab\n() ")
    )
    @example("(a{99999999999999999999})", "a")
    @example("(" * 5000, "a")
    @example("(?P<x>a)(?P<x>b)", "a")
    @example("(?<=a*)(b)", "b")
    def test_answer_patterns(self, pattern, text):
        """What is found is a part of the text with something in it."""
        recipe = Recipe(None, {**RECIPE, "generation": {"answer_pattern": pattern}}, {})
        try:
            parse_section(recipe, AriesConfig)
        except RecipeError as error:
            assert "`generation.answer_pattern`" in str(error)
            return
        found, _ = find_answer(text, re.compile(pattern))
        assert found is None or (found in text and found.strip())

    @given(parts=st.lists(st.sampled_from(TEMPLATE_PARTS) | st.text(max_size=3), max_size=6), draft=st.text())
    @example(["{% for a in drafts %}"] * 30 + ["{{ draft }}"] + ["{% endfor %}"] * 30, "")
    @example(["{{ draft }}", "{{ (" * 2000], "")
    def test_templates(self, parts, draft):
        """A template is refused or gives text; the draft is in it as it is wherever the template only shows it."""
        template = "".join(parts)
        try:
            recipe = Recipe(None, {**RECIPE, "refinements": {"template": template}}, {})
            compiled = compile_template(parse_section(recipe, AriesConfig).refinements.template)
            prompt = refinement_prompt("question", [draft], compiled)
        except RecipeError as error:
            assert "`refinements" in str(error)
            return
        assert isinstance(prompt, str)
        if set(parts) <= {"{{ draft }}", "{{ question }}"}:
            assert draft in prompt
