"""Bytes that forward keeps for backward, next to what torch.compile keeps in float."""

import functools

import pytest
import torch
from saving_models import MODELS, measure_float

import qcompiler
from qcompiler.demo.measure import measure_saved_bytes

RECIPES = ["hyperblock-int8", "hyperblock-int4", "tensor-int8", "in-hindsight-w8a8g8"]
LARGE = ["resnet20", "blocks", "conv-tanh", "gpt", "vit"]


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


@functools.cache
def float_bytes(name):
    return measure_float(*build(name))


def own_bytes(name, recipe, save=None):
    torch._dynamo.reset()
    model, x = build(name)
    return measure_saved_bytes(qcompiler.compile(model, recipe, backend="eager", save=save), x)


@pytest.mark.sample(3)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_without_the_role_no_more_than_float(name, recipe):
    """Besides tensors there are a key of 8 bytes, and 5 of scale and zero point for each range that has a past."""
    torch._dynamo.reset()
    model, x = build(name)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    measured = measure_saved_bytes(qmodel, x)
    past = [site for site in qmodel.plan().sites if site.is_forward and site.spec.range.has_state]
    assert measured <= float_bytes(name) + 8 + 5 * len(past)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    ("recipe", "save", "most"), [("hyperblock-int8", "int8", 0.30), ("hyperblock-int4", "int4", 0.17)]
)
def test_with_the_role_the_share_of_the_bits(name, recipe, save, most):
    assert own_bytes(name, recipe, save) <= most * float_bytes(name)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_what_autograd_keeps(name):
    torch._dynamo.reset()
    model, x = build(name)
    qmodel = qcompiler.compile(model, "hyperblock-int8", backend="eager", save="int8")
    measured = measure_saved_bytes(qmodel, x)
    assert qmodel.plan().saved_bytes == measured
    assert qmodel.plan().saved_code_bytes <= measured


def test_as_an_option_of_torch_compile(fresh):
    model, x = MODELS["conv-tanh"]()
    ours = qcompiler.compile(model, "identity", backend="eager", save="int8")
    options = {"recipe": "identity", "backend": "eager", "save": "int8"}
    compiled = torch.compile(model, backend="qcompiler", options=options)
    assert measure_saved_bytes(compiled, x) == measure_saved_bytes(ours, x)
    with pytest.raises(Exception, match="save: got 'int3'; valid: int8, int4 or None"):
        torch.compile(model, backend="qcompiler", options={"save": "int3"})(x.clone())
