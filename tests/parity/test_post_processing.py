"""From pictures and prompts to final instances against the official code's (origin: `tests/reference/README.md`)."""

import pytest
import torch

from uninext_hf.processing_uninext import UninextProcessor
from uninext_hf.prompt_uninext import Prompt

from .checks import check_instances


@pytest.fixture(scope="module")
def processor():
    return UninextProcessor.for_model()


@pytest.mark.parametrize("pad_to", [None, 256])
@torch.no_grad()
def test_detection(reference, processor, pad_to):
    """The video model records unclipped boxes in network input pixels."""
    case = reference.case("tiny_detection")
    inputs = processor(case.tensors["input.image"], case.meta["names"], do_resize=False, pad_to=pad_to)
    outputs = reference.tiny(case.meta["manifest"])(**inputs)
    found = processor.post_process_instances(outputs, case.meta["names"], clip=False)
    assert len(found) == 1
    check_instances(case, "final.", found[0])
    assert found[0].phrases == case.meta["names"]
    assert found[0].embeddings.shape == (100, 256)
    assert len(torch.unique(found[0].embeddings[:, 0])) == len(torch.unique(found[0].boxes, dim=0))


@torch.no_grad()
def test_image_model_on_a_batch_of_unequal_pictures(reference, processor):
    """Clipped and scaled to the size of the original pictures."""
    case = reference.case("tiny_detection_image")
    pictures = [case.tensors["input.image.0"], case.tensors["input.image.1"]]
    inputs = processor(pictures, case.meta["names"], do_resize=False)
    outputs = reference.tiny(case.meta["manifest"])(**inputs)
    found = processor.post_process_instances(outputs, case.meta["names"], target_sizes=case.meta["output_size"])
    assert [instances.image_size for instances in found] == [tuple(size) for size in case.meta["output_size"]]
    for index, instances in enumerate(found):
        check_instances(case, f"final.{index}.", instances)


@pytest.mark.parametrize("is_image_model", [False, True])
@torch.no_grad()
def test_expressions(reference, processor, is_image_model):
    """Three expressions on one picture, in one pass and each on its own."""
    case = reference.case("tiny_grounding")
    model = reference.tiny(case.meta["manifest_image" if is_image_model else "manifest"])
    prompts = [Prompt.expression(pair["raw"]) for pair in case.meta["expressions"]]
    sizes = [case.meta["output_size"]] if is_image_model else None
    options = {"target_sizes": sizes, "clip": is_image_model}
    inputs = processor(case.tensors["input.image"], prompts, do_resize=False)
    together = processor.post_process_instances(model(**inputs), inputs=inputs, **options)
    for index, prompt in enumerate(prompts):
        inputs = processor(case.tensors["input.image"], prompt, do_resize=False)
        alone = processor.post_process_instances(model(**inputs), prompt, **options)[0]
        for found in (together[index], alone):
            check_instances(case, f"{index}.{'image_model.' if is_image_model else ''}final.", found)


@pytest.mark.parametrize("name", ["tiny_sot_box", "tiny_sot_mask"])
@torch.no_grad()
def test_reference_pictures(reference, processor, name):
    """Frame 1 searched with the target of frame 0; boxes in output pixels, masks in network input pixels."""
    case = reference.case(name)
    frames, tensors = case.tensors["input.frames"], case.tensors
    target = {"mask": tensors["input.mask"]} if name.endswith("mask") else {"box": tensors["input.box_xyxy"][0]}
    prompt = {"image": frames[0], **target}
    inputs = processor(frames[1], prompt, do_resize=False)
    outputs = reference.tiny(case.meta["manifest"])(**inputs)
    scaled = processor.post_process_instances(
        outputs, prompt, target_sizes=[case.meta["output_size"]], output="box", clip=False
    )[0]
    assert abs(scaled.scores - tensors["frame.1.score"]) <= 1e-5
    assert (scaled.boxes - tensors["frame.1.box_input_scale"]).abs().max() <= 1e-2
    assert scaled.masks is None
    plain = processor.post_process_instances(outputs, inputs=inputs)[0]
    assert abs(plain.masks.sum() - tensors["frame.1.mask_area"]) <= 1e-3 * plain.masks.numel()


@torch.no_grad()
def test_chunks_and_mixed_kinds_agree_with_single_prompts(reference, processor):
    """A reference, an expression and names that fill several rows: the same results as one by one."""
    case = reference.case("tiny_sot_box")
    model, frames = reference.tiny(case.meta["manifest"]), case.tensors["input.frames"]
    names = reference.case("prompts").meta["sets"]["coco"]["names"][:20]
    short = UninextProcessor(processor.image_processor, processor.tokenizer, max_prompt_length=24)
    prompts = [{"image": frames[0], "box": case.tensors["input.box_xyxy"][0]}, "a red cup", names]
    inputs = short(frames[1], prompts, do_resize=False)
    assert len(inputs["pool_prompt"]) == len(inputs.rows) > 3
    outputs = model(**inputs)
    together = short.post_process_instances(outputs, inputs=inputs, output="box")
    assert len(together) == 3
    for found, again in zip(together, short.post_process_instances(outputs, prompts, output="box"), strict=True):
        assert torch.equal(found.scores, again.scores)
    for prompt, found in zip(prompts, together, strict=True):
        inputs = short(frames[1], prompt, do_resize=False)
        alone = short.post_process_instances(model(**inputs), prompt, output="box")[0]
        assert len(alone) == len(found)
        assert (alone.scores - found.scores).abs().max() <= 1e-5
        assert (alone.boxes - found.boxes).abs().max() <= 1e-2
