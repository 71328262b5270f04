"""Rules: the presets have the published coefficients, and invalid fields are refused in one line."""

import dataclasses
import math

import pytest

import pyfeedback
from pyfeedback import Rule, rule

COEFFICIENTS = ("decay", "amp", "null", "sparse", "self_", "tie")

# The coefficients of the paper in the convention of R(B). Omitted coefficients are 0.
PRESETS = {
    "bp": {},
    "fa": {},
    "wm": {"amp": 1e-3, "decay": 2e-3},
    "ia": {"amp": 2e-3, "null": 2e-3, "decay": 2e-3},
    "sa": {"self_": 2e-3, "decay": 2e-3},
    "aa": {"amp": 2e-3, "sparse": 2e-3},
    "kp": {"tie": 1.0, "decay": 2e-3},
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_coefficients_of_the_table(name):
    preset = rule(name)
    assert {c: getattr(preset, c) for c in COEFFICIENTS} == dict.fromkeys(COEFFICIENTS, 0.0) | PRESETS[name]
    assert preset.center == (name in ("wm", "ia"))
    assert preset.transport == (name == "bp")
    assert preset.learns == (name not in ("bp", "fa"))
    assert preset.reads_data == (name in ("wm", "ia", "aa"))
    assert (preset.samples, preset.reduction, preset.name) == (0, "batch", name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((c, 0.25) for c in COEFFICIENTS),
        ("center", False),
        ("samples", 3),
        ("samples", 0.5),
        ("reduction", "mean"),
    ],
    ids=str,
)
def test_override_changes_one_field(field, value):
    changed = rule("ia", **{field: value})
    assert getattr(changed, field) == value
    assert dataclasses.replace(changed, **{field: getattr(rule("ia"), field)}) == rule("ia")


def test_a_rule_is_its_own_preset():
    mine = Rule(amp=1.0, sparse=2.0, name="mine")
    assert rule(mine) == mine
    assert rule(mine, sparse=1.0) == Rule(amp=1.0, sparse=1.0)
    assert rule(mine, sparse=1.0).name == "mine"


def test_a_rule_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule("ia").amp = 1.0
    assert len({rule("ia"), rule("ia"), rule("ia", amp=1.0)}) == 2


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("field", COEFFICIENTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True], ids=repr)
def test_coefficient_that_is_not_a_finite_number_is_refused(field, value):
    with pytest.raises(ValueError, match=field) as error:
        rule("fa", **{field: value})
    assert_one_line(error, field, repr(value), "expected a finite number")


@pytest.mark.parametrize("value", [-1, 0.0, -0.5, 1.5, math.nan, True, "8", None], ids=repr)
def test_samples_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="samples") as error:
        rule("ia", samples=value)
    assert_one_line(error, "samples", repr(value), "expected an int of 0 or more, or a float in (0, 1]")


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction") as error:
        rule("ia", reduction="sum")
    assert_one_line(error, "reduction", "'sum'", "batch, mean")


@pytest.mark.parametrize("field", [{"decay": 1e-3}, {"tie": 1.0}, {"samples": 4}, {"center": True}], ids=str)
def test_transport_takes_no_coefficients(field):
    with pytest.raises(ValueError, match="transport") as error:
        rule("bp", **field)
    assert_one_line(error, "transport is True", "expected no coefficients")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signs": "random"}, "signs is 'random', expected one of free, uniform, fixed, batch"),
        ({"direct": True}, "direct is True, expected one of no, each, shared"),
        ({"expansion": -1}, "expansion is -1, expected an int of 0 or more"),
        ({"expansion": 2, "amp": 1.0}, "expansion is 2 in .*, expected no coefficients but tie and decay"),
        ({"signs": "fixed", "decay": 1.0}, "signs is fixed and direct no in .*, expected no coefficients"),
        ({"signs": "fixed", "direct": "each"}, "more than one of transport, signs, direct and expansion"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


@pytest.mark.parametrize("name", ["backprop", "IA", "", 3, None], ids=repr)
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="rule is") as error:
        rule(name)
    assert_one_line(error, repr(name), "expected")


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="alpha"):
        rule("ia", alpha=1.0)


@pytest.mark.parametrize(
    ("samples", "batch", "used"),
    [
        (0, 32, 0),
        (8, 32, 8),
        (32, 32, 0),
        (64, 32, 0),
        (8, 3, 0),
        (8, 0, 0),
        (1.0, 32, 0),
        (0.25, 32, 8),
        (0.125, 10, 2),
        (0.01, 32, 1),
        (0.5, 1, 1),
        (0.5, 0, 0),
    ],
)
def test_samples_of_a_batch(samples, batch, used):
    """An int is a maximum; a float is a fraction, rounded up to at least one; 0 means all samples for the ops."""
    assert rule("ia", samples=samples).coefficients(batch, 1).samples == used


@pytest.mark.parametrize(("reduction", "scale"), [("batch", 1.0), ("mean", 1 / 25)])
def test_reduction_scales_the_terms_that_sum_over_positions(reduction, scale):
    every = Rule(decay=1.0, amp=2.0, null=3.0, sparse=4.0, self_=5.0, tie=6.0, center=True, reduction=reduction)
    taken = every.coefficients(batch=8, positions=25)
    assert taken._asdict() == {
        "decay": 1.0,
        "amp": 2.0 * scale,
        "null": 3.0 * scale,
        "sparse": 4.0 * scale,
        "self_": 5.0,
        "tie": 6.0,
        "center": True,
        "samples": 0,
        "normalize": False,
    }


def test_reduction_of_an_empty_map_does_not_divide_by_zero():
    assert rule("ia", reduction="mean").coefficients(batch=2, positions=0).amp == rule("ia").amp


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (rule("fa"), "fa()"),
        (rule("bp"), "bp(transport=True)"),
        (rule("wm"), "wm(decay=0.002, amp=0.001, center=True)"),
        (rule("ia", samples=0.5), "ia(decay=0.002, amp=0.002, null=0.002, center=True, samples=0.5)"),
        (Rule(tie=1.0), "custom(tie=1.0)"),
    ],
    ids=str,
)
def test_str_shows_nonzero_fields(made, text):
    assert str(made) == text


def test_every_public_name_exists():
    assert {name for name in pyfeedback.__all__ if not hasattr(pyfeedback, name)} == set()


def test_a_fraction_of_samples_does_not_round_up_by_float_error():
    assert pyfeedback.rule("ia", samples=0.07).coefficients(100, 1).samples == 7
    assert pyfeedback.rule("ia", samples=0.55).coefficients(100, 1).samples == 55
    assert pyfeedback.rule("ia", samples=0.01).coefficients(10, 1).samples == 1
