"""Recipe errors: each names the file and the rule, what was given, and what is valid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.recipes.recipe import Recipe, RecipeError


def rule_yaml(*lines: str) -> str:
    """A recipe whose second rule has these lines."""
    return "name: x\nrules:\n- {format: int8}\n- " + "\n  ".join(lines)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(st.sampled_from("name rules:\n-[]{},'\"&*!|>%@#?x0=<~\t.é\x00"), max_size=40) | st.text(max_size=40))
def test_any_other_text_is_a_recipe_error(text):
    with pytest.raises(RecipeError, match=r"^recipe: "):
        Recipe.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^recipe: got None; valid: a mapping with the keys name, source, integer_biases, rules$"),
        ("[a]", r"^recipe: got \['a'\]; valid: a mapping with the keys name, source, integer_biases, rules$"),
        ("{", r"^recipe: not valid YAML: "),
        ("name: !!python/name:os.system x", r"(?s)^recipe: not valid YAML: .*could not determine a constructor"),
        ("name: 2023-13-45", r"^recipe: not valid YAML: month must be in 1..12"),
        ("{[a]: b}", r"(?s)^recipe: not valid YAML: .*unhashable key"),
        ("rules: []", r"^recipe: key 'name' is missing; valid keys: name, source, integer_biases, rules$"),
        ("name: x", r"^recipe: key 'rules' is missing; valid keys: name, source, integer_biases, rules$"),
        ("{name: x, rule: []}", r"^recipe: unknown key 'rule'; valid keys: name, .*; did you mean 'rules'\?$"),
        (
            "{name: x, rules: [{format: int8, range: hindsight(0.9,0.01)}]}",
            r"^recipe, rule 1: unknown key '0\.01\)'; .*\. Quote values with a comma: 'hindsight\(0\.9,0\.01\)'$",
        ),
        ("{name: x, rules: [], on: 1}", r"^recipe: unknown key True; valid keys: name, source, integer_biases, rules$"),
        ("{name: x, rules: }", r"^recipe: rules: got None; valid: a list of mappings, \[\] for none$"),
        ("{name: x, rules: {format: int8}}", r"^recipe: rules: got \{'format': 'int8'\}; valid: a list"),
        ("{name: 8, rules: []}", r"^recipe: name: got 8 \(int\); valid: text, in quotes if need be$"),
        ("{name: '', rules: []}", r"^recipe: name: got ''; valid: text that is not empty$"),
        ("{name: x, source: 2020-01-01, rules: []}", r"^recipe: source: got .* \(date\); valid: text"),
        ("{name: x, rules: [int8]}", r"^recipe, rule 1: got 'int8'; valid: a mapping with the keys role, "),
        ("name: x\nname: y\nrules: []", r"(?s)^recipe: not valid YAML: key 'name' is given twice.*line 2"),
    ],
)
def test_invalid_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["blok: b4", "format: int4"], r", rule 2: unknown key 'blok'; valid keys: role, operator, module, .*"
         r"reason, keep, format, scale, block, rounding, vjp, range; did you mean 'block'\?$"),
        (["xyz: b4", "format: int4"], r", rule 2: unknown key 'xyz'; valid keys: .*, vjp, range$"),
        (["format: int4", "role: weight", "format: int8"], r"(?s)'format' is given twice.*line 6"),
        (["role: weight"], r", rule 2: neither 'format' nor 'keep: true' is given; valid: one of them$"),
        (["scale: fit"], r", rule 2: neither 'format' nor 'keep: true' is given"),
        (["keep: true", "format: int4", "vjp: clip"], r", rule 2: 'keep: true' does not go together with format, vjp"),
        (["keep: false", "format: int4"], r", rule 2: keep: got False; valid: true, or no such key"),
        (["keep: 1"], r", rule 2: keep: got 1; valid: true"),
        (["keep: 'true'"], r", rule 2: keep: got 'true'; valid: true"),
        (["format: 4"], r", rule 2: format: got 4 \(int\); valid: text, in quotes if need be$"),
        (["format: [int4]"], r", rule 2: format: got \['int4'\] \(list\); valid: text"),
        (["format: int4", "module:"], r", rule 2: module: got None \(NoneType\); valid: text"),
        (["format: int4", "module: 0"], r", rule 2: module: got 0 \(int\); valid: text"),
        (["format: float4"], r", rule 2: number format: got 'float4'; valid: "),
        (["format: int9"], r", rule 2: integer format: 9 bits are not supported; valid: "),
        (["format: affine8"], r", rule 2: spec: affine8 has a zero point and needs scale 'real', got 'fit'$"),
        (["format: int4", "scale: fitt"], r", rule 2: scale: got 'fitt'; valid: max, fit, real, ceil, "),
        (["format: int4", "block: q4"], r", rule 2: block: got 'q4'; valid: "),
        (["format: int4", "rounding: up"], r", rule 2: rounding: got 'up'; valid: nearest, stochastic"),
        (["format: int4", "vjp: ste"], r", rule 2: vjp: got 'ste'; valid: pass, clip, or ewgs with"),
        (["format: int4", "range: past"], r", rule 2: range: got 'past'; valid: current, .*hindsight"),
        (["format: int4", "rotate: '12'"], r", rule 2: rotate: got 12; valid: 0 or a power of two$"),
        (["format: int4", "rotate: '-4'"], r", rule 2: rotate: got -4; valid: 0 or a power of two$"),
        (["format: int4", "rotate: many"], r", rule 2: rotate: got 'many'; valid: a whole number, in quotes$"),
        (["format: int4", "role: grad"], r", rule 2: role: got 'grad'; valid: weight, .*, output, saved$"),
        (["format: int4", "position: 1st"], r", rule 2: position: got '1st'; valid: first, inner, last$"),
        (["format: int4", "operator: conv"], r", rule 2: operator: got 'conv'; valid: .* did you mean 'convolution'\?"),
    ],
)  # fmt: skip
def test_invalid_rule(lines, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(rule_yaml(*lines))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, r"^recipe: name: got ''; valid: text that is not empty$"),
        ({"name": None}, r"^recipe: name: got None; valid: text"),
        ({"source": None}, r"^recipe 'x': source: got None; valid: text$"),
        ({"integer_biases": "yes"}, r"^recipe 'x': integer_biases: got 'yes'; valid: true or false$"),
        ({"rules": []}, r"^recipe 'x': rules: got \[\]; valid: a tuple of Rule$"),
        ({"rules": (None,)}, r"^recipe 'x': rules: got \(None,\); valid: a tuple of Rule$"),
    ],
)
def test_invalid_field(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**({"name": "x", "rules": ()} | fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{name: x, rules: [{formt: int8}]}", r"bad\.yaml, rule 1: unknown key 'formt'.*; did you mean 'format'"),
        (b"name: x", r"bad\.yaml: key 'rules' is missing"),
        (b"name: [", r"bad\.yaml: not valid YAML: "),
        (b"name: \xff", r"bad\.yaml: not a text file in UTF-8$"),
        (b"\xff\xfeeibberish", r"bad\.yaml: not a text file in UTF-8$"),
        (b"", r"bad\.yaml: got None"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Recipe.from_file(tmp_path / "none.yaml")
