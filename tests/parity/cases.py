"""What is compared for each recorded case, as one function per kind of case.

Used by the tests, and by `python -m tests.parity.report`, which writes the table of differences.
"""

import torch

from uninext_hf import UninextProcessor

from .checks import agree, check_instances, check_network, check_picture

VIDEO, IMAGE = "tiny_video_r50", "tiny_image_r50"


def text_rows(reference, name: str, rows: int = 1) -> dict[str, torch.Tensor]:
    return {key: value.expand(rows, -1) for key, value in reference.text(name).items()}


def prefixed(prefix: str, found: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in found.items()}


@torch.no_grad()
def detection(reference, name: str) -> dict[str, float]:
    """A reduced video model on one picture, everything named in the reference's README."""
    case = reference.case(name)
    model = reference.tiny(case.meta["manifest"])
    pixels = reference.pixels(case.tensors["input.image"])
    prompt = model.get_prompt_features(**reference.text("coco"))
    found = {"text.hidden": agree(case, "text.hidden", prompt.hidden)}
    found |= check_picture(case, "", model, pixels)
    return found | check_network(case, "", model, model.get_image_features(pixels), prompt)


@torch.no_grad()
def padded_batch(reference, name: str) -> dict[str, float]:
    """Unequal pictures in one batch equal the official padded batch (not the single pictures)."""
    case = reference.case(name)
    model = reference.tiny(case.meta["manifest"])
    pixels, mask = reference.batch(case)
    prompt = model.get_prompt_features(**text_rows(reference, "coco", len(pixels)))
    return check_network(case, "", model, model.get_image_features(pixels, mask), prompt)


@torch.no_grad()
def expression(reference, name: str, index: int, model=None, **options) -> dict[str, float]:
    """One referring expression; the recorded score of every query included."""
    case = reference.case(name)
    model = model or reference.tiny(case.meta["manifest"])
    pixels = reference.pixels(case.tensors["input.image"])
    prompt = model.get_prompt_features(**reference.text(f"expression.{index}"), pool_prompt=torch.tensor([True]))
    found = {"text.hidden": agree(case, f"{index}.text.hidden", prompt.hidden)}
    if f"{index}.memory.slice" in case.tensors:
        found |= check_picture(case, f"{index}.", model, pixels)
    image = model.get_image_features(pixels)
    found |= check_network(case, f"{index}.", model, image, prompt, **options)
    if not options:
        outputs = model(image_features=image, prompt_features=prompt)
        scores = (outputs.logits[0, :, 0].sigmoid() * outputs.pred_ious[0].sigmoid()).sqrt()
        found["scores_all"] = agree(case, f"{index}.scores_all", scores, atol=1e-5)
        assert (outputs.logits[..., 1:] == -50000).all()
    return prefixed(f"{index}.", found)


def expressions(reference, name: str) -> dict[str, float]:
    """All recorded expressions."""
    found: dict[str, float] = {}
    for index in range(len(reference.case(name).meta["expressions"])):
        found |= expression(reference, name, index)
    return found


@torch.no_grad()
def template(reference, name: str) -> dict[str, float]:
    """Crop -> 4-channel backbone -> prompt features -> all frames searched with them."""
    case, model = reference.case(name), reference.tiny(VIDEO)
    crop = reference.template(case)
    encoder = model.model.template_encoder
    maps = encoder.image_encoder(crop["template_values"])
    found = {
        f"ref_backbone.res{stage}": agree(case, f"ref_backbone.res{stage}", maps[stage - 3]) for stage in (3, 4, 5)
    }
    fused = encoder.fuse(model.model.input_projections(maps))
    found["prompt.0.fused_map"] = agree(case, "prompt.0.fused_map", fused)
    prompt = model.get_prompt_features(**crop)
    found["prompt.0.hidden"] = agree(case, "prompt.0.hidden", prompt.hidden)
    assert torch.equal(prompt.valid, case.tensors["prompt.0.mask"].bool())
    assert prompt.attend.all()
    assert prompt.pool.all()
    for frame in (1, 2, 3):
        prefix = f"frame.{frame}."
        pixels = reference.pixels(case.tensors["input.frames"][frame])
        image = model.get_image_features(pixels)
        if f"{prefix}memory.slice" in case.tensors:
            found |= prefixed(prefix, check_picture(case, prefix, model, pixels))
            found |= prefixed(prefix, check_network(case, prefix, model, image, prompt, outputs=False))
        outputs = model(image_features=image, prompt_features=prompt, output_masks=True)
        scores = (outputs.logits[0, :, 0].sigmoid() * outputs.pred_ious[0].sigmoid()).sqrt()
        best = int(scores.argmax())
        assert best == int(case.tensors[f"{prefix}best_index"])
        found |= {
            f"{prefix}scores_all": agree(case, f"{prefix}scores_all", scores, atol=1e-5),
            f"{prefix}boxes_all": agree(case, f"{prefix}boxes_all", outputs.pred_boxes[0]),
            f"{prefix}best_mask_lowres": agree(case, f"{prefix}best_mask_lowres", outputs.pred_masks[0, best]),
        }
    return found


def common_share(chosen: torch.Tensor, recorded: torch.Tensor) -> float:
    return len(set(chosen.flatten().tolist()) & set(recorded.flatten().tolist())) / recorded.numel()


@torch.no_grad()
def finals(reference, name: str) -> dict[str, float]:
    """Final instances of a reduced case through the whole processor."""
    case = reference.case(name)
    found = {}
    for prefix, prompt, pictures, model, options in _final_runs(case):
        found |= prefixed(prefix, _final(case, prefix, reference.tiny(model), pictures, prompt, options))
    return found


def _final_runs(case) -> list[tuple]:
    """(prefix, prompt, pictures, manifest, options) of each list of instances that a case records."""
    meta, tensors = case.meta, case.tensors
    if meta["task"] == "grounding":
        raw = {"clip": False}
        scaled = {"target_sizes": [meta["output_size"]]}
        expressions = [pair["raw"] for pair in meta["expressions"]]
        return [
            (prefix, text, [tensors["input.image"]], manifest, options)
            for index, text in enumerate(expressions)
            for prefix, manifest, options in (
                (f"{index}.final.", meta["manifest"], raw),
                (f"{index}.image_model.final.", meta["manifest_image"], scaled),
            )
            if f"{prefix}scores" in tensors
        ]
    if "input.image" in tensors:  # the video model records unclipped boxes in network input pixels
        return [("final.", meta["names"], [tensors["input.image"]], meta["manifest"], {"clip": False})]
    pictures = [tensors[name] for name in sorted(tensors) if name.startswith("input.image.")]
    return [("final.", meta["names"], pictures, meta["manifest"], {"target_sizes": meta["output_size"]})]


def _final(case, prefix, model, pictures, prompt, options, proposal_indices=None) -> dict[str, float]:
    processor = UninextProcessor.for_model(model.config)
    inputs = processor(pictures, prompt, do_resize=False)
    outputs = model(**inputs, proposal_indices=proposal_indices)
    results = processor.post_process_instances(outputs, inputs=inputs, **options)
    if f"{prefix}scores" in case.tensors:
        return check_instances(case, prefix, results[0])
    found = {}
    for index, instances in enumerate(results):
        found |= prefixed(f"{index}.", check_instances(case, f"{prefix}{index}.", instances))
    return found


@torch.no_grad()
def full_size(reference, name: str) -> dict[str, float]:
    """A full-size model in two parts: free running up to the proposals, then with the recorded selection injected.

    Neighbouring proposals are closer in score than float32 convolutions agree, so a correct implementation may swap a
    few ranks, and with them rows of everything after (reference README, Tolerances).
    """
    case = reference.case(name)
    model = reference.full(case.meta["manifest"])
    pixels = reference.pixels(case.tensors["input.image"])
    image = model.get_image_features(pixels)
    found = {}
    for prefix, text, pooled in prompts_of(case):
        prompt = model.get_prompt_features(**reference.text(text), pool_prompt=torch.tensor([pooled]))
        part = {"text.hidden": agree(case, f"{prefix}text.hidden", prompt.hidden)}
        recorded = case.tensors.get(f"{prefix}twostage.topk_index")
        if recorded is not None:
            part |= check_picture(case, prefix, model, pixels)
            part |= check_network(case, prefix, model, image, prompt, outputs=False, part="before")
            chosen = model.model(image_features=image, prompt_features=prompt).proposal_indices
            share = common_share(chosen, recorded)
            assert share >= 0.99, share
            part["twostage.topk_index (share not in common)"] = 1 - share
            part |= check_network(case, prefix, model, image, prompt, proposal_indices=recorded.long(), part="after")
        found |= prefixed(prefix, part)
    for prefix, prompt, pictures, manifest, options in _final_runs(case):
        recorded = case.tensors.get(f"{prefix.removesuffix('final.')}twostage.topk_index")
        if recorded is not None:
            indices = recorded.long()
            found |= prefixed(
                prefix, _final(case, prefix, reference.full(manifest), pictures, prompt, options, indices)
            )
    return found


@torch.no_grad()
def full_image_model(reference, name: str) -> dict[str, float]:
    """The full-size image model. Its selection is not recorded, so near ties that swapped are found from the boxes.

    A swap exchanges two neighbouring rows: both boxes are far off, and their proposals' scores are closer than float32
    convolutions agree. At most 1 % of the ranks may have swapped; then everything after must agree.
    """
    case = reference.case(name)
    model = reference.full(case.meta["manifest"])
    pixels, mask = reference.batch(case)
    image = model.get_image_features(pixels, mask)
    prompt = model.get_prompt_features(**reference.text("coco"))
    trunk = model.model(image_features=image, prompt_features=prompt)
    indices = trunk.proposal_indices.clone()
    scores = trunk.proposal_logits.gather(1, indices)[0]
    boxes = trunk.intermediate_reference_boxes[:, -1]
    far = (boxes - case.tensors["out.pred_boxes"]).abs().amax(-1)[0] > 1e-3
    swapped = (far[:-1] & far[1:] & (scores[:-1] - scores[1:] < 1e-5)).nonzero().flatten().tolist()
    assert 2 * len(swapped) == int(far.sum()) <= 0.01 * indices.numel()
    for rank in swapped:
        indices[0, [rank, rank + 1]] = indices[0, [rank + 1, rank]]
    found = {"twostage.topk_index (share not in common)": 0.0, "swapped near ties": float(len(swapped))}
    found |= check_network(case, "", model, image, prompt, proposal_indices=indices)
    for prefix, names, pictures, _, options in _final_runs(case):
        found |= prefixed(prefix, _final(case, prefix, model, pictures, names, options, indices))
    return found


def prompts_of(case) -> list[tuple[str, str, bool]]:
    """(prefix of the names, recorded prompt, pooled) of each prompt in a case."""
    if case.meta["task"] == "grounding":
        return [(f"{index}.", f"expression.{index}", True) for index in range(len(case.meta["expressions"]))]
    return [("", "coco", False)]


REDUCED = {
    "tiny_detection": (detection, finals),
    "tiny_detection_image": (padded_batch, finals),
    "tiny_grounding": (expressions, finals),
    "tiny_sot_box": (template,),
    "tiny_sot_mask": (template,),
}
FULL = {
    "full_r50_detection": (full_size,),
    "full_r50_detection_image": (full_image_model,),
    "full_r50_grounding": (full_size,),
    "full_convnext_large_detection": (full_size,),
    "full_vit_huge_detection": (full_size,),
}


def run(reference, name: str) -> dict[str, float]:
    """All comparisons of a case: value -> largest absolute difference."""
    found: dict[str, float] = {}
    for compare in (REDUCED | FULL)[name]:
        found |= compare(reference, name)
    return found
