"""Template crops against the official code's (origin: `tests/reference/README.md`)."""

import pytest
import torch

from uninext_hf.image_processing_uninext import UninextImageProcessor, crop_template


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_crop(reference, index, kind):
    """Whole pictures, all four borders, boxes larger than the picture and very small ones."""
    case = reference.case("modules_standalone")
    tensors, prefix = case.tensors, f"template.{index}.{kind}."
    values, keep = crop_template(
        tensors["template.image"][0],
        1 - tensors["template.pad_mask"][0, 0].long(),  # recorded: 1 = padding
        tensors[f"template.{index}.box_xywh"][0].tolist(),
        tensors["template.gt_mask"][0, 0].float() if kind == "mask" else None,
    )
    for name, value in (("image", values[None, :3]), ("target", values[None, 3:]), ("pad", ~keep[None])):
        report = case.check(prefix + name, value.float(), rtol=0, atol=1e-5)
        assert report.ok(), str(report)
    sums = torch.stack([values[:3].sum(), values[3].sum(), (~keep).sum()])
    assert (sums - tensors[f"{prefix}sums"]).abs().max() < 0.01


@pytest.mark.parametrize("name", ["tiny_sot_box", "tiny_sot_mask"])
def test_prepared_template(reference, name):
    """From a picture and a box or mask; the box of a mask reaches to the far side of its last pixels."""
    case = reference.case(name)
    prompt = {"mask": case.tensors["input.mask"]} if name.endswith("mask") else {}
    prompt = prompt or {"box": case.tensors["input.box_xyxy"][0]}
    template = UninextImageProcessor().prepare_template(case.tensors["input.frames"][0], **prompt, do_resize=False)
    values, keep = template["template_values"][None], template["template_mask"][None]
    for part, value in (("image", values[:, :3]), ("target_mask", values[:, 3:]), ("pad_mask", ~keep)):
        report = case.check(f"template.0.{part}", value.float(), rtol=0, atol=1e-5)
        assert report.ok(), str(report)
