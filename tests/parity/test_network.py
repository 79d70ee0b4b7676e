"""The network against values recorded from the official implementation (origin: `tests/reference/README.md`)."""

import pytest
import torch

from .checks import agree, check_network, check_picture

VIDEO, IMAGE = "tiny_video_r50", "tiny_image_r50"


@torch.no_grad()
def test_detection(reference):
    case, model = reference.case("tiny_detection"), reference.tiny(VIDEO)
    pixels = reference.pixels(case.tensors["input.image"])
    prompt = model.get_prompt_features(**reference.text("coco"))
    agree(case, "text.hidden", prompt.hidden)
    found = check_picture(case, "", model, pixels)
    found |= check_network(case, "", model, model.get_image_features(pixels), prompt)
    assert len(found) >= 25, sorted(found)


@torch.no_grad()
def test_image_model_on_a_padded_batch(reference):
    """Unequal pictures in one batch equal the official padded batch (not the single pictures)."""
    case, model = reference.case("tiny_detection_image"), reference.tiny(IMAGE)
    pictures = [reference.pixels(case.tensors[f"input.image.{index}"])[0] for index in range(2)]
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    pixels = torch.zeros(2, 3, height, width)
    mask = torch.zeros(2, height, width, dtype=torch.int64)
    for row, picture in enumerate(pictures):
        pixels[row, :, : picture.shape[1], : picture.shape[2]] = picture
        mask[row, : picture.shape[1], : picture.shape[2]] = 1
    text = {key: value.expand(2, -1) for key, value in reference.text("coco").items()}
    found = check_network(
        case, "", model, model.get_image_features(pixels, mask), model.get_prompt_features(**text)
    )
    assert {"out.pred_logits", "out.pred_boxes", "out.mask_lowres"} <= set(found)
    sizes = model.get_image_features(pixels, mask).input_sizes.tolist()
    assert sizes == [list(picture.shape[1:]) for picture in pictures]


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 2])
def test_expressions(reference, index):
    case, model = reference.case("tiny_grounding"), reference.tiny(VIDEO)
    pixels = reference.pixels(case.tensors["input.image"])
    prompt = model.get_prompt_features(**reference.text(f"expression.{index}"), pool_prompt=torch.tensor([True]))
    agree(case, f"{index}.text.hidden", prompt.hidden)
    image = model.get_image_features(pixels)
    found = check_network(case, f"{index}.", model, image, prompt)
    assert len(found) >= (20 if index == 0 else 7), sorted(found)
    outputs = model(image_features=image, prompt_features=prompt)
    scores = (outputs.logits[0, :, 0].sigmoid() * outputs.pred_ious[0].sigmoid()).sqrt()
    agree(case, f"{index}.scores_all", scores, atol=1e-5)
    assert (outputs.logits[..., 1:] == -50000).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_sot_box", "tiny_sot_mask"])
def test_template_prompt_and_first_frame(reference, name):
    """Crop (recorded) -> 4-channel backbone -> prompt features -> the first frame searched with them."""
    case, model = reference.case(name), reference.tiny(VIDEO)
    crop = reference.template(case)
    encoder = model.model.template_encoder
    maps = encoder.image_encoder(crop["template_values"])
    for stage in (3, 4, 5):
        agree(case, f"ref_backbone.res{stage}", maps[stage - 3])
    agree(case, "prompt.0.fused_map", encoder.fuse(model.model.input_projections(maps)))
    prompt = model.get_prompt_features(**crop)
    agree(case, "prompt.0.hidden", prompt.hidden)
    assert torch.equal(prompt.valid, case.tensors["prompt.0.mask"].bool())
    assert prompt.attend.all()
    assert prompt.pool.all()
    for frame in (1, 2, 3):
        pixels = reference.pixels(case.tensors["input.frames"][frame])
        image = model.get_image_features(pixels)
        if frame == 1 and "frame.1.memory.slice" in case.tensors:
            check_picture(case, "frame.1.", model, pixels)
            assert len(check_network(case, "frame.1.", model, image, prompt, outputs=False)) >= 14
        outputs = model(image_features=image, prompt_features=prompt, output_masks=True)
        scores = (outputs.logits[0, :, 0].sigmoid() * outputs.pred_ious[0].sigmoid()).sqrt()
        agree(case, f"frame.{frame}.scores_all", scores, atol=1e-5)
        agree(case, f"frame.{frame}.boxes_all", outputs.pred_boxes[0])
        best = int(scores.argmax())
        assert best == int(case.tensors[f"frame.{frame}.best_index"])
        agree(case, f"frame.{frame}.best_mask_lowres", outputs.pred_masks[0, best])
