"""Masked attention under recipes that quantize outputs: finite numbers near those of float, the same sites in eval."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.usefixtures("fresh")

INF = float("-inf")
RECIPES = ("in-hindsight-w8a8g8", "deploy-int8", "running-w8a8g8")


class Attention(nn.Module):
    """One head, masked in one of the ways that people write."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def masked(self, q, k, hidden):
        scores, mask = q @ k.transpose(1, 2), torch.zeros(hidden.shape).masked_fill(hidden, INF)
        if self.how == "fill":
            return scores.masked_fill(hidden, INF)
        if self.how == "where":
            return torch.where(hidden, INF, scores)
        if self.how == "lowest":
            return scores + hidden.float() * torch.finfo(torch.float32).min
        return torch.baddbmm(mask, q, k.transpose(1, 2)) if self.how == "baddbmm" else scores + mask

    def forward(self, x, hidden):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.how == "fused":
            return self.out(x + F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden))
        return self.out(x + self.masked(q, k, hidden).softmax(-1) @ v)


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["add", "lowest", "fill", "where", "baddbmm", "fused"])
def test_masks_leave_ranges_alone(how, recipe, eager):
    """8 bits: the error of an output is a few steps of 1/127 of the largest number, so a twentieth in the norm."""
    model, x = Attention(how), torch.randn(3, 5, 8)
    hidden = torch.zeros(3, 5, 5, dtype=torch.bool)
    hidden[0, :, 3:] = hidden[:, 0, 4] = True
    compiled, expected = eager(copy.deepcopy(model), recipe), model(x, hidden)
    for _ in range(2):
        y = compiled(x, hidden)
        y.square().mean().backward()
    assert (y - expected).norm() <= 0.05 * expected.norm()
    assert all(parameter.grad.isfinite().all() for parameter in compiled.parameters())
    evaluated = compiled.eval()(x, hidden)
    assert (evaluated - expected).norm() <= 0.05 * expected.norm()
    outputs = [
        {site.name for site in compiled.plan(training=mode).sites if site.name.endswith("/output")}
        for mode in (True, False)
    ]
    assert outputs[0] == outputs[1] != set()


def test_multi_head_attention_with_a_padding_mask(eager):
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    compiled = eager(copy.deepcopy(model), "in-hindsight-w8a8g8")
    for _ in range(2):
        y, weights = compiled(x, x, x, key_padding_mask=padding)
        (y.sum() + weights.square().sum()).backward()
    expected, _ = model(x, x, x, key_padding_mask=padding)
    assert (y - expected).norm() <= 0.05 * expected.norm()
    assert not weights[0, :, 3:].any()
    compiled.plan()


class Spectral(nn.Module):
    """A layer that mixes the channels of a spectrum by complex weights, and a real one beside it."""

    def __init__(self):
        super().__init__()
        self.weight, self.point = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat) / 2), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return torch.fft.irfft(torch.einsum("bix,io->box", torch.fft.rfft(x), self.weight), n=8) + self.point(x)


@pytest.mark.parametrize("recipe", [*RECIPES, "hyperblock-int4", "int4-hadamard"])
def test_complex_contractions_stay_in_float_and_say_so(recipe, eager):
    model, x = Spectral(), torch.randn(3, 4, 8)
    compiled = eager(copy.deepcopy(model), recipe)
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    reasons = [kept.reason for kept in compiled.plan().kept if "torch.complex64" in kept.reason]
    assert len(reasons) >= 3  # both operands in forward, and the gradients of both
    assert all(reason.startswith("nothing to quantize: torch.complex64") for reason in reasons)
    assert any(site.name == "point/weight" for site in compiled.plan().sites) or recipe == "int4-hadamard"
    found = compiled.weight.grad
    assert F.cosine_similarity(*(torch.view_as_real(g).flatten() for g in (found, model.weight.grad)), 0) > 0.9
