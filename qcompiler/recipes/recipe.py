"""Recipe: the rules of one way to train in few bits, as a value, and as YAML that people write by hand."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, Self

import yaml

from qcompiler.files import replace_file
from qcompiler.passes.rules import Behind, Position, Product, Role, Rule, Sign, did_you_mean, saves_floats
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.numbers.blocks import parse_block
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.estimators import parse_range
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import QuantSpec, Scale, parse_choice, parse_vjp


class RecipeError(QCompilerError, ValueError):
    """A recipe is not valid. The message names the file and the rule, counted from 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A name and an ordered list of rules; the first rule that matches an operand decides.

    An operand that no rule matches stays in float, so a recipe without rules changes nothing.
    `Recipe.from_yaml(recipe.to_yaml()) == recipe`.

    Raises:
        RecipeError: an empty name, or a field of the wrong type.
    """

    #: how the recipe is called on the command line and in reports
    name: str
    #: in the order of the trials
    rules: tuple[Rule, ...]
    #: the paper behind the recipe
    source: str = ""
    #: eval mode rounds biases as engines do that add integers (passes/round_biases.py)
    integer_biases: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"recipe: name: got {self.name!r}; valid: text that is not empty")
        if not isinstance(self.source, str):
            raise RecipeError(f"recipe {self.name!r}: source: got {self.source!r}; valid: text")
        if not isinstance(self.integer_biases, bool):
            raise RecipeError(
                f"recipe {self.name!r}: integer_biases: got {self.integer_biases!r}; valid: true or false"
            )
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise RecipeError(f"recipe {self.name!r}: rules: got {self.rules!r}; valid: a tuple of Rule")

    def for_eval(self) -> Self:
        """Return the recipe with a batch edge of 1 in every block: no result of a sample depends on batch mates.

        Ranges of the past do not depend on batch mates either, so these blocks stay. All else, rounding too, is
        unchanged; the recipe itself if all blocks are so already.
        """
        rules = tuple(
            dataclasses.replace(rule, spec=rule.spec.with_block(rule.spec.block.per_sample()))
            if rule.spec is not None and not rule.spec.range.has_state
            else rule
            for rule in self.rules
        )
        return self if rules == self.rules else dataclasses.replace(self, rules=rules)

    @property
    def has_state(self) -> bool:
        """True if a rule takes ranges from the past."""
        return any(rule.spec is not None and rule.spec.range.has_state for rule in self.rules)

    @property
    def saves(self) -> bool:
        """True if a rule speaks of floats that operators without a contraction keep for their gradients."""
        return saves_floats(self.rules)

    def unused(self, matched: AbstractSet[int]) -> list[Rule]:
        """The rules that decided nothing, in order, given the indices of those that did: mostly typing errors."""
        return [rule for index, rule in enumerate(self.rules) if index not in matched]

    def to_yaml(self) -> str:
        """Return the recipe as YAML, one line a rule.

        Conditions that hold for everything are left out, and so is the range `current`; other spec fields never.
        """
        head: dict[str, Any] = {"name": self.name} | ({"source": self.source} if self.source else {})
        head |= {"integer_biases": True} if self.integer_biases else {}
        data = head | {"rules": [_rule_to_dict(rule) for rule in self.rules]}
        # YAML takes these for line breaks and folds line breaks into spaces; escaped characters come back unchanged
        plain = not any(mark in text for mark in "\x85\u2028\u2029" for text in self._texts())
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=plain, width=float("inf"), default_flow_style=None)

    def _texts(self) -> list[str]:
        """Return every text that people wrote freely."""
        return [self.name, self.source, *(text for rule in self.rules for text in (rule.module, rule.reason))]

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Return the recipe that `to_yaml` or a person wrote.

        A rule has conditions (`role`, `operator`, `module`, `position`, `product`, `sign`), all optional, a
        `reason`, and either `keep: true` or the fields of a spec, of which only `format` is required.

        Raises:
            RecipeError: no YAML, an unknown or repeated key, a value of the wrong type, or one that is not valid.
        """
        return cls._parse(text, "recipe")

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_yaml()`. The file at `path` is replaced in one step: old or new, never half.

        Raises:
            OSError: the file cannot be written; an old one is then unchanged.
        """
        with replace_file(path) as draft:
            draft.write_bytes(self.to_yaml().encode())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return the recipe in a YAML file.

        Raises:
            RecipeError: as for `from_yaml`; the message names the file.
            OSError: the file cannot be read.
        """
        return cls._parse(Path(path).read_bytes(), f"recipe {os.fspath(path)}")

    @classmethod
    def _parse(cls, text: str | bytes, where: str) -> Self:
        try:
            # decoded here, since YAML guesses UTF-16 from the first bytes of anything
            text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
            data = yaml.load(text, Loader=_Loader)  # a SafeLoader
        except UnicodeDecodeError:
            raise RecipeError(f"{where}: not a text file in UTF-8") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2023-13-45
            raise RecipeError(f"{where}: not valid YAML: {error}") from error
        data = _read_mapping(data, where, _RECIPE_KEYS)
        if missing := [key for key in ("name", "rules") if key not in data]:
            raise RecipeError(f"{where}: key {missing[0]!r} is missing; valid keys: {', '.join(_RECIPE_KEYS)}")
        if not isinstance(data["rules"], list):
            raise RecipeError(f"{where}: rules: got {data['rules']!r}; valid: a list of mappings, [] for none")
        rules = tuple(_rule_from_dict(rule, f"{where}, rule {i}") for i, rule in enumerate(data["rules"], start=1))
        texts = {key: _write_text(data[key], key, where) for key in ("name", "source") if key in data}
        return cls(rules=rules, integer_biases=data.get("integer_biases", False), **texts)


#: how the text of each key becomes a field of `Rule` or of `QuantSpec`; `str` of the field gives the text back
_CONDITIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "role": lambda text: parse_choice(Role, text, "role"),
    "operator": str,
    "module": str,
    "position": lambda text: parse_choice(Position, text, "position"),
    "product": lambda text: parse_choice(Product, text, "product"),
    "sign": lambda text: parse_choice(Sign, text, "sign"),
    "rotate": lambda text: _read_whole(text, "rotate"),
    "behind": lambda text: parse_choice(Behind, text, "behind"),
    "reason": str,
}
_SPEC: Final[Mapping[str, Callable[[str], Any]]] = {
    "format": parse_format,
    "scale": lambda text: parse_choice(Scale, text, "scale"),
    "block": parse_block,
    "rounding": lambda text: parse_choice(Rounding, text, "rounding"),
    "vjp": parse_vjp,
    "range": parse_range,
}
_RECIPE_KEYS: Final = ("name", "source", "integer_biases", "rules")
_RULE_KEYS: Final = (*_CONDITIONS, "keep", *_SPEC)
_EVERYTHING: Final = Rule(spec=None)


def _read_whole(text: str, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{key}: got {text!r}; valid: a whole number, in quotes") from None


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    conditions = {key: getattr(rule, key) for key in _CONDITIONS if getattr(rule, key) != getattr(_EVERYTHING, key)}
    texts = {} if rule.spec is None else {key: str(getattr(rule.spec, key)) for key in _SPEC}
    if texts.get("range") == str(Current()):
        del texts["range"]
    action: dict[str, Any] = dict(texts) if texts else {"keep": True}
    return {key: str(value) for key, value in conditions.items()} | action


def _rule_from_dict(data: object, where: str) -> Rule:
    data = _read_mapping(data, where, _RULE_KEYS)
    spec_keys = [key for key in _SPEC if key in data]
    if "keep" in data and data["keep"] is not True:
        raise RecipeError(f"{where}: keep: got {data['keep']!r}; valid: true, or no such key in a rule that quantizes")
    if "keep" in data and spec_keys:
        raise RecipeError(f"{where}: 'keep: true' does not go together with {', '.join(spec_keys)}; leave one out")
    if "keep" not in data and "format" not in data:
        raise RecipeError(f"{where}: neither 'format' nor 'keep: true' is given; valid: one of them")
    texts = {key: _write_text(value, key, where) for key, value in data.items() if key != "keep"}
    try:
        spec = QuantSpec(**_list_fields(texts, _SPEC)) if spec_keys else None
        return Rule(spec=spec, **_list_fields(texts, _CONDITIONS))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _list_fields(texts: Mapping[str, str], parsers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    return {key: parse(texts[key]) for key, parse in parsers.items() if key in texts}


def _write_text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: got {value!r} ({type(value).__name__}); valid: text, in quotes if need be")
    return value


def _read_mapping(data: object, where: str, valid: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: got {data!r}; valid: a mapping with the keys {', '.join(valid)}")
    for key in data:
        if key not in valid:
            hint = did_you_mean(key, valid) if isinstance(key, str) else ""
            if data[key] is None:  # {range: hindsight(0.9,0.01)} has the key 0.01)
                hint += ". Quote values with a comma: 'hindsight(0.9,0.01)'"
            raise RecipeError(f"{where}: unknown key {key!r}; valid keys: {', '.join(valid)}{hint}")
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; plain YAML silently takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node
