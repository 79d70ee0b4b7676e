"""Faster or batched forms equal their plain forms, forward and backward."""

import pytest
import torch

from uninext_hf.mask_head_uninext import dynamic_mask_logits
from uninext_hf.modeling_uninext import UninextEarlyFusion

FIELDS = ("logits", "pred_boxes", "pred_ious", "mask_kernels", "mask_features", "query_embeddings", "reference_points")


def assert_rows_equal(actual, expected, row, columns=None, atol=1e-5, single=0):
    for name in FIELDS:
        left, right = actual[name][row], expected[name][single]
        if name == "logits" and columns:
            left, right = left[:, :columns], right[:, :columns]
        torch.testing.assert_close(left, right, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("length", [1, 16, 80])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("clamped", [False, True])
def test_folded_fusion_equals_plain(tiny, length, masked, clamped):
    torch.manual_seed(0)
    fusion = UninextEarlyFusion(tiny.config).eval()
    fusion.load_state_dict(tiny.model.fusion.state_dict())
    dtype = torch.float32
    if clamped:  # scores beyond the bound of 50,000, which float32 resolves to 0.004 only
        dtype = torch.float64
        fusion.double()
        with torch.no_grad():
            fusion.visual_query.weight.mul_(3e5)
    attend = torch.ones(2, length, dtype=torch.bool)
    if masked:
        attend[1, (length + 1) // 2 :] = False
    results = []
    for form in (fusion.plain, fusion.folded):
        generator = torch.Generator().manual_seed(1)
        visual = torch.randn(2, 150, 32, generator=generator, dtype=dtype).requires_grad_()
        prompt = torch.randn(2, length, 16, generator=generator, dtype=dtype).requires_grad_()
        fusion.zero_grad()
        updates = form(visual, prompt, attend)
        sum(update.square().sum() for update in updates).backward()
        gradients = [parameter.grad.clone() for parameter in fusion.parameters() if parameter.grad is not None]
        results.append([*updates, visual.grad, prompt.grad, *gradients])
    for expected, actual in zip(*results, strict=True):
        bound = float(expected.detach().abs().max()) * 5e-6 + 1e-6
        torch.testing.assert_close(actual, expected, atol=bound, rtol=0)


def test_fusion_chooses_the_folded_form_where_it_pays(tiny, monkeypatch):
    used = []
    for name in ("plain", "folded"):
        original = getattr(UninextEarlyFusion, name)

        def spy(self, *inputs, name=name, original=original):
            used.append(name)
            return original(self, *inputs)

        monkeypatch.setattr(UninextEarlyFusion, name, spy)
    fusion = tiny.model.fusion
    for tokens, length in ((300, 2), (300, 400)):
        fusion(torch.randn(1, tokens, 32), torch.randn(1, length, 16), torch.ones(1, length, dtype=torch.bool))
    assert used == ["folded", "plain"]
    training = UninextEarlyFusion(tiny.config).train()
    training(torch.randn(1, 300, 32), torch.randn(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
    assert used[-1] == "plain"  # dropout on the attention maps


@torch.no_grad()
def test_selected_masks_equal_all_masks_then_selected(tiny, pictures, text):
    outputs = tiny(pictures, **text, output_masks=True)
    origins = outputs.reference_points * outputs.input_sizes.flip(-1)[:, None]
    chosen = torch.tensor([3, 11, 4])
    for row in range(2):
        masks = dynamic_mask_logits(
            outputs.mask_kernels[row][chosen], outputs.mask_features[row], origins[row][chosen]
        )
        torch.testing.assert_close(masks, outputs.pred_masks[row][chosen], atol=1e-5, rtol=1e-5)


def test_dynamic_head_equals_the_convolutions_it_replaces():
    """Relative coordinates concatenated to the features, then 1x1 convolutions per instance; values and gradients."""
    torch.manual_seed(0)
    channels, height, width, instances = 8, 5, 7, 6
    inputs = [torch.randn(instances, 169), torch.randn(channels, height, width), torch.rand(instances, 2) * 50]

    def plain(kernels, features, origins):
        ys, xs = torch.meshgrid(torch.arange(height) * 8.0 + 4, torch.arange(width) * 8.0 + 4, indexing="ij")
        logits = []
        for kernel, origin in zip(kernels, origins, strict=True):
            relative = torch.stack([origin[0] - xs, origin[1] - ys])
            x = torch.cat([relative, features])
            w0, w1, w2, b0, b1, b2 = kernel.split([80, 64, 8, 8, 8, 1])
            x = (torch.einsum("oi,ihw->ohw", w0.view(8, 10), x) + b0[:, None, None]).relu()
            x = (torch.einsum("oi,ihw->ohw", w1.view(8, 8), x) + b1[:, None, None]).relu()
            logits.append(torch.einsum("oi,ihw->ohw", w2.view(1, 8), x) + b2[:, None, None])
        from uninext_hf.mask_head_uninext import aligned_upsample

        return aligned_upsample(torch.stack(logits), 2)[:, 0]

    results = []
    for function in (plain, dynamic_mask_logits, lambda *args: dynamic_mask_logits(*args, chunk_size=4)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        output.square().mean().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected, atol=float(expected.detach().abs().max()) * 1e-5, rtol=0)


@torch.no_grad()
def test_equal_sized_batch_equals_singles(tiny, pictures, text):
    together = tiny(pictures, **text)
    for row in range(2):
        alone = tiny(pictures[row : row + 1], **{key: value[row : row + 1] for key, value in text.items()})
        assert_rows_equal(together, alone, row)


@torch.no_grad()
def test_text_padding_changes_nothing(tiny, pictures, text):
    padded = {key: torch.nn.functional.pad(value, (0, 11)) for key, value in text.items()}
    short, long = tiny(pictures, **text), tiny(pictures, **padded)
    for row, columns in enumerate((9, 6)):
        assert_rows_equal(long, short, row, columns, single=row)


@torch.no_grad()
def test_several_prompts_on_one_picture(tiny, pictures, text):
    """Image features once; rows equal separate calls; `image_index` in any order and number."""
    image = tiny.get_image_features(pictures)
    prompt = tiny.get_prompt_features(**text)
    index = torch.tensor([1, 0, 1])
    rows = prompt._replace(**{name: value[[0, 1, 1]] for name, value in prompt._asdict().items()})
    together = tiny(image_features=image, prompt_features=rows, image_index=index)
    assert together.logits.shape[0] == 3
    for row, (picture, words) in enumerate([(1, 0), (0, 1), (1, 1)]):
        alone = tiny(pictures[picture : picture + 1], **{key: value[words : words + 1] for key, value in text.items()})
        assert_rows_equal(together, alone, row)
    # One picture and several prompts need no index.
    single = tiny(pictures[:1], **text)
    assert_rows_equal(single, tiny(pictures[:1], **{k: v[1:] for k, v in text.items()}), 1)


@torch.no_grad()
def test_mixed_kinds_in_a_batch(tiny, pictures, text, templates):
    """Categories, an expression and two templates in one call equal separate calls."""
    rows = torch.tensor([0, 1, 0, 1])
    is_text = torch.tensor([True, False, True, False])
    ids, mask = text["input_ids"][[0, 0, 1, 0]].clone(), text["attention_mask"][[0, 0, 1, 0]].clone()
    ids[~is_text], mask[~is_text] = 0, torch.tensor([1] + [0] * 8)
    values = templates["template_values"][[0, 0, 0, 1]].clone()
    inside = templates["template_mask"][[0, 0, 0, 1]].clone()
    values[is_text], inside[is_text] = 0, False
    pool = torch.tensor([False, True, True, True])
    together = tiny(pictures, None, ids, mask, values, inside, pool, image_index=rows)
    alone = [
        (tiny(pictures[:1], input_ids=text["input_ids"][:1], attention_mask=text["attention_mask"][:1]), 9),
        (tiny(pictures[1:], **{key: value[:1] for key, value in templates.items()}), 1),
        (tiny(pictures[:1], **{k: v[1:] for k, v in text.items()}, pool_prompt=pool[1:2]), 1),
        (tiny(pictures[1:], **{key: value[1:] for key, value in templates.items()}), 1),
    ]
    for row, (single, columns) in enumerate(alone):
        assert_rows_equal(together, single, row, columns)
    assert (together.logits[1:, :, 1:] == -50000).all()
    features = tiny.get_prompt_features(ids, mask, values, inside, pool)
    # Template rows attend to all their own slots, padded ones included, and pool those inside the picture only.
    slots = 8 * 8
    assert features.attend.sum(1).tolist() == [9, slots, 6, slots]
    assert features.valid.sum(1).tolist() == [9, 5 * 8, 6, slots]


@torch.no_grad()
def test_features_are_reusable_and_never_modified(tiny, pictures, text, templates):
    image = tiny.get_image_features(pictures)
    for kind in (text, templates):
        prompt = tiny.get_prompt_features(**kind)
        before = [value.clone() for value in (*image, *prompt) if isinstance(value, torch.Tensor)]
        first = tiny(image_features=image, prompt_features=prompt)
        again = tiny(image_features=image, prompt_features=prompt)
        direct = tiny(pictures, **kind)
        for name in FIELDS:
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], direct[name])
        after = [value for value in (*image, *prompt) if isinstance(value, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(AttributeError):
        image.tokens = None


def test_exactly_one_of_each_pair(tiny, pictures, text):
    image, prompt = tiny.get_image_features(pictures), tiny.get_prompt_features(**text)
    with pytest.raises(ValueError, match=r'"pixel_values" and "image_features".*both'):
        tiny(pictures, **text, image_features=image)
    with pytest.raises(ValueError, match=r'"pixel_values" and "image_features".*neither'):
        tiny(**text)
    with pytest.raises(ValueError, match=r'"prompt_features".*both'):
        tiny(pictures, **text, prompt_features=prompt)
    with pytest.raises(ValueError, match=r'"prompt_features".*neither'):
        tiny(pictures)
    with pytest.raises(ValueError, match=r'"image_index" must be given'):
        tiny(pictures, input_ids=text["input_ids"][[0, 0, 1]])
    with pytest.raises(ValueError, match='"labels" must be None'):
        tiny(pictures, **text, labels=[{}, {}])
    with pytest.raises(ValueError, match=r'"image_index" must have shape'):
        tiny(pictures, **text, image_index=torch.tensor([0]))


@torch.no_grad()
def test_injected_proposals(tiny, pictures, text):
    free = tiny(pictures, **text)
    same = tiny(pictures, **text, proposal_indices=free.proposal_indices)
    for name in FIELDS:
        assert torch.equal(free[name], same[name])
    other = tiny(pictures, **text, proposal_indices=free.proposal_indices.flip(1))
    assert not torch.allclose(free.pred_boxes, other.pred_boxes)
    assert torch.equal(other.proposal_indices, free.proposal_indices.flip(1))


@torch.no_grad()
def test_picture_with_fewer_positions_than_queries(tiny, text):
    outputs = tiny(torch.randn(2, 3, 9, 17), **text, output_masks=True)
    assert outputs.logits.shape[1] == outputs.proposal_indices.shape[1] == 2 * 3 + 1 * 2 + 1 + 1
    assert outputs.pred_masks.shape[-2:] == (4, 6)


@torch.no_grad()
def test_mask_of_the_extra_level_is_sampled_from_the_stride_8_mask(tiny):
    """As official; for this size, sampling the picture's mask would give another row."""
    pixel_mask = torch.zeros(1, 65, 64)
    pixel_mask[:, :29] = 1
    image = tiny.get_image_features(torch.randn(1, 3, 65, 64), pixel_mask)
    sizes = [height * width for height, width in image.spatial_shapes]
    masks = [part.view(shape) for part, shape in zip(image.mask[0].split(sizes), image.spatial_shapes, strict=True)]
    fine = torch.nn.functional.interpolate(masks[0][None, None].float(), size=masks[3].shape)[0, 0]
    picture = torch.nn.functional.interpolate(pixel_mask[None], size=masks[3].shape)[0, 0]
    assert torch.equal(masks[3], fine.bool())
    assert not torch.equal(fine, picture)
