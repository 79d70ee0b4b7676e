"""The op: gather form against `grid_sample`, forward and backward."""

import pytest
import torch

from uninext_hf import deformable_attention_uninext as op
from uninext_hf.deformable_attention_uninext import (
    MultiScaleDeformableAttention,
    deformable_attention_gather,
    deformable_attention_grid_sample,
)

PYRAMIDS = {
    "four levels": ((12, 15), (6, 8), (3, 4), (2, 2)),
    "one level": ((7, 5),),
    "a 1x1 level": ((5, 9), (1, 1)),
}


def problem(shapes, batch=2, queries=7, heads=3, dim=8, points=4, dtype=torch.float32, spread=1.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = sum(height * width for height, width in shapes)
    value = torch.randn(batch, length, heads, dim, generator=generator, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator, dtype=dtype)
    locations = (locations - 0.5) * spread + 0.5  # some outside
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=generator, dtype=dtype)
    return value, locations, weights / weights.sum((-1, -2), keepdim=True)


@pytest.mark.parametrize("shapes", PYRAMIDS.values(), ids=PYRAMIDS)
@pytest.mark.parametrize(
    ("queries", "points", "dim", "batch"), [(7, 4, 8, 2), (1, 1, 16, 1), (0, 4, 32, 1), (300, 8, 40, 3), (9, 4, 64, 2)]
)
def test_forward(shapes, queries, points, dim, batch):
    value, locations, weights = problem(shapes, batch=batch, queries=queries, points=points, dim=dim)
    expected = deformable_attention_grid_sample(value, shapes, locations, weights)
    actual = deformable_attention_gather(value, shapes, locations, weights)
    assert actual.shape == (batch, queries, 3 * dim)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_chunks_change_nothing(monkeypatch):
    shapes = PYRAMIDS["four levels"]
    value, locations, weights = problem(shapes, queries=50)
    whole = deformable_attention_gather(value, shapes, locations, weights)
    monkeypatch.setattr(op, "QUERY_CHUNK", 16)
    assert torch.equal(deformable_attention_gather(value, shapes, locations, weights), whole)


@pytest.mark.parametrize("where", ["centres", "borders", "far outside"])
def test_special_points(where):
    shapes = ((4, 6),)
    value, _, weights = problem(shapes, batch=1, queries=24, points=1)
    ys, xs = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    grid = torch.stack([(xs + 0.5) / 6, (ys + 0.5) / 4], dim=-1).flatten(0, 1)
    if where == "borders":
        grid = torch.stack([(xs / 5).round(), ys / 4], dim=-1).flatten(0, 1)
    if where == "far outside":
        grid = (grid - 0.5) * 1e6
    locations = grid.view(1, 24, 1, 1, 1, 2).expand(-1, -1, 3, -1, -1, -1).contiguous()
    expected = deformable_attention_grid_sample(value, shapes, locations, weights)
    torch.testing.assert_close(
        deformable_attention_gather(value, shapes, locations, weights), expected, atol=2e-5, rtol=0
    )
    assert (expected.abs().sum() == 0) == (where == "far outside")


def test_not_a_number_and_infinite_points_count_as_outside():
    shapes = PYRAMIDS["four levels"]
    value, locations, weights = problem(shapes)
    value.requires_grad_()
    clean = deformable_attention_gather(value, shapes, locations, weights)
    bad = locations.clone()
    bad[0, 0, 0, 0, 0, 0], bad[0, 1, 0, 0, 0, 1], bad[0, 2, 0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    bad.requires_grad_()
    output = deformable_attention_gather(value, shapes, bad, weights)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(value.grad).all()
    assert torch.isfinite(bad.grad).all()
    assert torch.equal(output[1], clean[1])
    outside = locations.clone()
    outside[0, 0, 0, 0, 0], outside[0, 1, 0, 0, 0], outside[0, 2, 0, 0, 0] = -9, 9, -9
    torch.testing.assert_close(output, deformable_attention_gather(value, shapes, outside, weights))


@pytest.mark.parametrize("shapes", PYRAMIDS.values(), ids=PYRAMIDS)
def test_gradients(shapes):
    gradients = []
    for function in (deformable_attention_grid_sample, deformable_attention_gather):
        inputs = [tensor.requires_grad_() for tensor in problem(shapes)]
        function(inputs[0], shapes, *inputs[1:]).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=float(expected.abs().max()) * 1e-5, rtol=0)


def test_gradcheck_in_float64():
    shapes = ((3, 4), (2, 2))
    value, _, weights = problem(shapes, batch=1, queries=2, heads=2, dim=3, points=2, dtype=torch.float64)
    # Away from pixel centres, where bilinear sampling has a kink.
    cells = torch.rand(1, 2, 2, 2, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sizes = torch.tensor([[4, 3], [2, 2]], dtype=torch.float64)[:, None]
    locations = ((cells * (sizes - 1)).floor() + 0.5 + 0.2 + 0.6 * cells) / sizes
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda *tensors: deformable_attention_gather(tensors[0], shapes, *tensors[1:]), inputs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_summed_in_float32(dtype):
    shapes = PYRAMIDS["four levels"]
    value, locations, weights = problem(shapes)
    value = value.to(dtype)
    expected = deformable_attention_gather(value.float(), shapes, locations, weights)
    actual = deformable_attention_gather(value, shapes, locations, weights)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))


def test_head_major_values():
    shapes = PYRAMIDS["four levels"]
    value, locations, weights = problem(shapes)
    head_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not head_major.is_contiguous()
    assert torch.equal(
        deformable_attention_gather(head_major, shapes, locations, weights),
        deformable_attention_gather(value, shapes, locations, weights),
    )


def test_registry(monkeypatch):
    assert op.choose_implementation("auto", "cpu") == "gather"
    assert op.choose_implementation("auto", "cuda") == "grid_sample"
    assert op.choose_implementation("grid_sample", "cpu") == "grid_sample"
    with pytest.raises(ValueError, match=r"msda_implementation.*'fast'"):
        MultiScaleDeformableAttention("fast")
    monkeypatch.setattr(op, "_IMPLEMENTATIONS", dict(op._IMPLEMENTATIONS))
    monkeypatch.setattr(op, "_AUTOMATIC", dict(op._AUTOMATIC))
    op.register_implementation("mine", lambda *inputs: deformable_attention_grid_sample(*inputs) + 1, ("cpu",))
    shapes = PYRAMIDS["one level"]
    value, locations, weights = problem(shapes)
    layer = MultiScaleDeformableAttention()
    output = layer(value, torch.tensor(shapes), shapes, torch.tensor([0]), locations, weights, 64)
    torch.testing.assert_close(output, deformable_attention_grid_sample(value, shapes, locations, weights) + 1)
