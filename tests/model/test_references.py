"""Several references for one target: their tokens stand one after the other, as in the official template update."""

import numpy as np
import pytest
import torch

from uninext_hf.modeling_uninext import UninextPromptFeatures
from uninext_hf.processing_uninext import UninextProcessor
from uninext_hf.prompt_uninext import Prompt

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SMALL = {"size": {"shortest_edge": 96}}
BOXES = [(10, 10, 40, 30), (0, 0, 9, 9), (30, 5, 60, 40)]
ONES = [Prompt.template(PICTURE, box=box) for box in BOXES]


@pytest.fixture(scope="module")
def processor():
    return UninextProcessor.for_model()


def features(model, inputs):
    names = ("input_ids", "attention_mask", "template_values", "template_mask", "pool_prompt")
    with torch.no_grad():
        return model.get_prompt_features(**{name: inputs[name] for name in names if name in inputs})


def test_tensors(processor):
    one = processor(prompts=[ONES[0]])
    assert one["template_values"].shape == (1, 4, 256, 256)  # one reference each: as ever
    inputs = processor(prompts=[Prompt.templates(ONES[:2]), ONES[0], ["cat"]])
    assert inputs["template_values"].shape == (3, 2, 4, 256, 256)
    assert inputs["template_mask"].shape == (3, 2, 256, 256)
    for row, slot in ((0, 0), (1, 0)):
        assert torch.equal(inputs["template_values"][row, slot], one["template_values"][0])
    for row, slot in ((1, 1), (2, 0), (2, 1)):
        assert not inputs["template_values"][row, slot].any()
        assert not inputs["template_mask"][row, slot].any()
    assert inputs["pool_prompt"].tolist() == [True, True, False]


@pytest.mark.parametrize("count", [2, 3])
def test_features_are_those_of_each_reference_joined(tiny, processor, count):
    joined = features(tiny, processor(prompts=[Prompt.templates(ONES[:count])]))
    alone = [features(tiny, processor(prompts=[one])) for one in ONES[:count]]
    assert joined.hidden.shape[1] == 1024 * count
    torch.testing.assert_close(joined.hidden, torch.cat([one.hidden for one in alone], dim=1), atol=1e-5, rtol=1e-5)
    assert torch.equal(joined.valid, torch.cat([one.valid for one in alone], dim=1))
    assert not joined.valid.all()  # the second box reaches over the border
    assert joined.attend.all()
    assert joined.pool.all()


def test_rows_with_fewer_references_see_only_their_own(tiny, processor):
    prompts = [ONES[2], Prompt.templates(ONES[:2]), Prompt.expression("a bird"), Prompt.templates(ONES)]
    batch = processor(images=[PICTURE], prompts=prompts, **SMALL)
    found = features(tiny, batch)
    assert found.attend.sum(1).tolist() == [1024, 2048, 4, 3072]
    assert not (found.valid & ~found.attend).any()
    with torch.no_grad():
        together = tiny(**batch)
        for row, prompt in enumerate(prompts):
            alone = tiny(**processor(images=[PICTURE], prompts=[prompt], **SMALL))
            torch.testing.assert_close(alone.logits[0, :, 0], together.logits[row, :, 0], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(alone.pred_boxes[0], together.pred_boxes[row], atol=1e-4, rtol=0)


def test_forward_equals_features_joined_by_hand(tiny, processor):
    inputs = processor(images=[PICTURE], prompts=[Prompt.templates(ONES[:2])], **SMALL)
    parts = [features(tiny, processor(prompts=[one], **SMALL)) for one in ONES[:2]]
    by_hand = UninextPromptFeatures(
        *(torch.cat(values, dim=1) for values in zip(*(part[:3] for part in parts), strict=True)), parts[0].pool
    )
    with torch.no_grad():
        wanted = tiny(inputs["pixel_values"], inputs["pixel_mask"], prompt_features=by_hand)
        found = tiny(**inputs)
        single = tiny(inputs["pixel_values"], inputs["pixel_mask"], prompt_features=parts[0])
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    assert (found.logits[..., 0] - single.logits[..., 0]).abs().max() > 1e-3  # the second one has a say
    results = processor.post_process_instances(found, inputs=inputs, target_sizes=[(40, 60)])
    assert len(results[0]) == 1
    assert results[0].phrases == ["target"]


def test_first_slot_counts_even_without_a_mask_inside(tiny):
    values = torch.randn(1, 2, 4, 64, 64)
    mask = torch.zeros(1, 2, 64, 64)
    mask[:, 1] = 1
    with torch.no_grad():
        found = tiny.get_prompt_features(template_values=values, template_mask=mask)
        everything = tiny.get_prompt_features(template_values=values)
    assert found.attend.all()
    assert found.valid.sum() == 64
    assert everything.valid.all()
