"""QuantSpec: its canonical string, and the combinations it refuses."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.numbers.blocks import AXES, TENSOR, Block
from qcompiler.runtime.numbers.formats import BITS, Format, IntFormat, Kind, parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.estimators import ESTIMATORS
from qcompiler.runtime.ranges.statistical import Sawb
from qcompiler.runtime.spec import Ewgs, QuantSpec, Scale, Vjp, parse_choice, parse_spec

BLOCKS = st.builds(Block, **dict.fromkeys(AXES.values(), st.integers(0, 300)))
ESTIMATOR_NAMES = ", ".join(kind.name for kind in ESTIMATORS)
INTS = st.builds(IntFormat, st.sampled_from(BITS), st.sampled_from(list(Kind)))
FLOATS = st.sampled_from(["e4m3", "e4m3nan", "e5m2inf", "e4m3b11", "e2m1", "e3m0", "e3m0r4x2", "e5m10"]).map(
    parse_format
)


def rules_of(form: Format) -> list[Scale]:
    """The scale rules that go with a format."""
    if form.kind is Kind.AFFINE:
        return [Scale.REAL]
    return [rule for rule in Scale if isinstance(form, IntFormat) or rule not in ("ceil", "round")]


SPECS = (INTS | FLOATS).flatmap(
    lambda form: st.builds(
        QuantSpec,
        format=st.just(form),
        scale=st.sampled_from(rules_of(form)),
        block=BLOCKS,
        rounding=st.sampled_from(list(Rounding)),
        vjp=st.sampled_from(list(Vjp)),
        range=st.sampled_from([kind() for kind in ESTIMATORS if not kind.is_learned and kind is not Sawb]),
    )
)


@given(SPECS)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_text_round_trip(spec: QuantSpec) -> None:
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(format=IntFormat(8)), "int8:fit:each:nearest:pass"),
        (QuantSpec(format=IntFormat(8), block=Block(batch=4, channel=16)), "int8:fit:b4c16:nearest:pass"),
        (
            QuantSpec(
                format=IntFormat(4, Kind.UNSIGNED),
                scale=Scale.MAX,
                block=TENSOR,
                rounding=Rounding.STOCHASTIC,
                vjp=Vjp.CLIP,
            ),
            "uint4:max:tensor:stochastic:clip",
        ),
        (QuantSpec(format=IntFormat(8, Kind.AFFINE), scale=Scale.REAL), "affine8:real:each:nearest:pass"),
        (QuantSpec(format=IntFormat(4), block=TENSOR, vjp=Ewgs(1)), "int4:fit:tensor:nearest:ewgs(1)"),
        (QuantSpec(format=IntFormat(4), block=TENSOR, vjp=Ewgs(1 / 3)), f"int4:fit:tensor:nearest:ewgs({1 / 3!r})"),
        (QuantSpec(format=IntFormat(4), block=TENSOR, vjp=Ewgs(1e-7)), "int4:fit:tensor:nearest:ewgs(1e-07)"),
    ],
)
def test_text(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text
    assert parse_spec(text) == spec


@pytest.mark.parametrize("scale", [scale for scale in Scale if scale is not Scale.REAL])
def test_zero_point_needs_a_real_scale(scale: Scale) -> None:
    with pytest.raises(ValueError, match=f"^spec: affine8 has a zero point and needs scale 'real', got '{scale}'$"):
        QuantSpec(format=IntFormat(8, Kind.AFFINE), scale=scale)


@pytest.mark.parametrize("text", ["", "int8", "int8:fit:each:nearest", "int8:fit:each:nearest:pass:current:"])
def test_parse_refuses_other_than_five_or_six_fields(text: str) -> None:
    with pytest.raises(ValueError, match=f"^spec: got '{text}'; valid: format:scale:block:rounding:vjp and a range"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9:fit:each:nearest:pass", r"^integer format: 9 bits are not supported"),
        ("byte:fit:each:nearest:pass", r"^number format: got 'byte'; valid: int, uint or affine"),
        ("int8:log:each:nearest:pass", f"^scale: got 'log'; valid: {', '.join(Scale)}$"),
        ("int8:fit:q4:nearest:pass", r"^block: got 'q4'; valid: 'tensor', 'each'"),
        ("int8:fit:each:up:pass", f"^rounding: got 'up'; valid: {', '.join(Rounding)}$"),
        ("int8:fit:each:nearest:ewgs", r"^vjp: got 'ewgs'; valid: pass, clip, or ewgs with a number"),
        (
            "int8:fit:each:nearest:pass:past",
            f"^range: got 'past'; valid: {ESTIMATOR_NAMES}, with",
        ),
        (
            "e4m3:ceil:each:nearest:pass",
            r"^spec: scale 'ceil' is for integers, got e4m3; valid: max, fit, real, one",
        ),
        ("e2m1:round:each:nearest:pass", r"^spec: scale 'round' is for integers, got e2m1; valid: max, fit, real, one"),
        ("e9m9:fit:each:nearest:pass", r"^float format: e9m9 is not supported"),
        ("affine4:fit:each:nearest:pass", r"^spec: affine4 has a zero point and needs scale 'real', got 'fit'$"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


def test_choice() -> None:
    assert parse_choice(Scale, "real", "scale") is Scale.REAL
    with pytest.raises(ValueError, match=f"^knob: got 'REAL'; valid: {', '.join(Scale)}$"):
        parse_choice(Scale, "REAL", "knob")


@pytest.mark.parametrize(
    ("name", "scale", "has_zero_point", "saturates"),
    [
        ("int8", "fit", False, False),
        ("int8", "real", False, False),
        ("int8", "max", False, True),  # amax of almost 2^E lies above code 127
        ("uint8", "fit", False, True),  # negative values clip to 0
        ("uint8", "real", False, True),
        ("uint8", "max", False, True),
        ("affine8", "real", True, False),
        ("e4m3", "fit", False, False),
        ("e4m3", "real", False, False),
        ("e4m3", "max", False, True),  # amax below 512 lies above 448
        ("e4m3", "one", False, True),
        ("e2m1", "two-level", False, True),
        ("int8", "ceil", False, True),
        ("int8", "round", False, True),
    ],
)
def test_derived_facts(name: str, scale: str, has_zero_point: bool, saturates: bool) -> None:
    spec = parse_spec(f"{name}:{scale}:each:nearest:pass")
    assert (spec.has_zero_point, spec.saturates) == (has_zero_point, saturates)


def test_with_block() -> None:
    spec = parse_spec("uint4:max:each:stochastic:clip")
    assert str(spec.with_block(TENSOR)) == "uint4:max:tensor:stochastic:clip"
    assert spec.block == Block()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec(format=IntFormat(8)).scale = Scale.MAX  # type: ignore[misc]


@pytest.mark.parametrize("delta", [-1.0, float("nan"), float("inf")])
def test_ewgs_refuses(delta: float) -> None:
    with pytest.raises(ValueError, match=r"^vjp: ewgs: delta: got (-1|nan|inf); valid: a number from 0$"):
        Ewgs(delta)
