"""The network against values recorded from the official implementation (origin: `tests/reference/README.md`)."""

import pytest

from . import cases


def test_detection(reference):
    assert len(cases.detection(reference, "tiny_detection")) >= 30


def test_image_model_on_a_padded_batch(reference):
    found = cases.padded_batch(reference, "tiny_detection_image")
    assert {"out.pred_logits", "out.pred_boxes", "out.mask_lowres"} <= set(found)
    pixels, mask = reference.batch(reference.case("tiny_detection_image"))
    sizes = reference.tiny(cases.IMAGE).get_image_features(pixels, mask).input_sizes
    assert sizes.tolist() == [[150, 214], [110, 240]]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_expressions(reference, index):
    found = cases.expression(reference, "tiny_grounding", index)
    assert len(found) >= (30 if index == 0 else 9), sorted(found)


@pytest.mark.parametrize(("name", "values"), [("tiny_sot_box", 30), ("tiny_sot_mask", 14)])
def test_template_prompt_and_frames(reference, name, values):
    assert len(cases.template(reference, name)) >= values
