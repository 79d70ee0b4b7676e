"""Single modules against values recorded from the official implementation (origin: `tests/reference/README.md`)."""

import pytest
import torch

from uninext_hf.mask_head_uninext import aligned_upsample, dynamic_mask_logits
from uninext_hf.modeling_uninext import (
    UninextEncoder,
    _Levels,
    _query_code,
    _references_per_level,
    box_code,
    inverse_sigmoid,
    pool_prompt_tokens,
    position_code,
)

from .checks import agree


@pytest.fixture(scope="module")
def case(reference):
    return reference.case("modules_standalone")


@pytest.fixture(scope="module")
def model(reference):
    return reference.tiny("tiny_video_r50")


@pytest.fixture(scope="module")
def shapes(case):
    return tuple(tuple(shape) for shape in case.meta["spatial_shapes"])


@pytest.fixture(scope="module")
def mask(case):
    return ~case.tensors["pad_mask"].bool()


@pytest.fixture(scope="module")
def level_masks(mask, shapes):
    parts = mask.split([height * width for height, width in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.fixture(scope="module")
def lang(case):
    return case.tensors["lang"], case.tensors["lang_mask"].bool()


def test_position_code_and_ratios(case, model, level_masks, shapes):
    codes = [position_code(level, 256) for level in level_masks]
    for level in (0, 1):
        agree(case, f"position.level{level}", codes[level].transpose(1, 2).unflatten(2, shapes[level]))
    embedded = [code + model.model.level_embed[level] for level, code in enumerate(codes)]
    agree(case, "position_plus_level", torch.cat(embedded, dim=1))
    ratios = [
        torch.stack([level[:, 0].sum(1) / level.shape[2], level[:, :, 0].sum(1) / level.shape[1]], dim=-1)
        for level in level_masks
    ]
    agree(case, "valid_ratios", torch.stack(ratios, dim=1))


def test_inverse_sigmoid(case):
    agree(case, "inverse_sigmoid.out", inverse_sigmoid(case.tensors["inverse_sigmoid.in"]))


@torch.no_grad()
def test_encoder_layer(case, model, mask, shapes):
    source, ratios = case.tensors["src"], case.tensors["valid_ratios"]
    references = UninextEncoder.reference_points(shapes, ratios)
    agree(case, "encoder.reference_points", references)
    masks = [
        part.unflatten(1, shape) for part, shape in zip(mask.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ]
    positions = torch.cat(
        [position_code(level, 256) + model.model.level_embed[index] for index, level in enumerate(masks)], dim=1
    )
    levels = _Levels.of(shapes, source.device)
    layer = model.model.encoder.layers[0]
    attention, _ = layer.self_attn(source + positions, references, source, mask, levels)
    agree(case, "encoder.layer0.attention", attention)
    agree(case, "encoder.layer0.out", layer(source, positions, references, mask, levels))


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "folded", "forward"])
@pytest.mark.parametrize("kind", ["int_mask", "bool_mask"])
def test_fusion(case, model, lang, form, kind):
    """An integer mask masks; a boolean one (template prompts) masks nothing."""
    hidden, valid = lang
    fusion = model.model.fusion
    attend = valid if kind == "int_mask" else torch.ones_like(valid)
    visual, prompt = fusion.visual_layer_norm(case.tensors["src"]), fusion.prompt_layer_norm(hidden)
    if form == "forward":
        visual, prompt = fusion(case.tensors["src"], hidden, attend)
    else:
        updates = getattr(fusion, form)(visual, prompt, attend)
        visual, prompt = visual + fusion.visual_scale * updates[0], prompt + fusion.prompt_scale * updates[1]
    agree(case, f"fusion.{kind}.visual", visual)
    agree(case, f"fusion.{kind}.lang", prompt)


@torch.no_grad()
def test_proposals(case, model, mask, shapes):
    proposals = model.model.proposals
    anchors, usable = proposals.anchors(mask, case.tensors["valid_ratios"], shapes)
    agree(case, "twostage.proposals", anchors)
    states = proposals.project(case.tensors["src"], usable)
    agree(case, "twostage.memory", states)


@torch.no_grad()
def test_decoder_layer(case, model, mask, shapes):
    tensors, decoder = case.tensors, model.model.decoder
    references = _references_per_level(tensors["decoder.reference"], tensors["valid_ratios"])
    agree(case, "decoder.sine", box_code(references[:, :, 0], 128))
    positions = decoder.reference_head(_query_code(references, tensors["decoder.tgt"]))
    agree(case, "decoder.query_pos", positions)
    levels = _Levels.of(shapes, references.device)
    arguments = (tensors["decoder.tgt"], positions, references, tensors["src"], mask, levels)
    agree(case, "decoder.layer0.out", decoder.layers[0](*arguments))
    blocked = torch.zeros(tensors["decoder.attn_mask"].shape).masked_fill(
        tensors["decoder.attn_mask"].bool(), -torch.inf
    )
    agree(case, "decoder.layer0.out_masked", decoder.layers[0](*arguments, blocked[None, None]))


@torch.no_grad()
def test_heads(case, model, lang):
    queries, (hidden, valid) = case.tensors["decoder.tgt"], lang
    pooled = pool_prompt_tokens(hidden, valid)
    agree(case, "lang_pooled", pooled)
    agree(case, "class.tokens", model.alignment_heads[0](queries, hidden))
    agree(case, "class.pooled", model.alignment_heads[0](queries, pooled[:, None]))
    agree(case, "class.encoder", model.model.proposals.class_head(queries))
    agree(case, "box.delta", model.model.decoder.box_heads[0](queries))
    agree(case, "iou", model.iou_heads[0](queries))
    agree(case, "denoising_label", model.denoising_label_projection(pooled))


@torch.no_grad()
def test_mask_branch_and_dynamic_head(case, model, shapes):
    features = model.mask_branch(case.tensors["src"], shapes)
    agree(case, "mask.features", features)
    kernels = model.mask_controller(case.tensors["decoder.tgt"])
    agree(case, "mask.params", kernels)
    origins = case.tensors["mask.reference_pixels"]
    logits = [dynamic_mask_logits(*row) for row in zip(kernels, features, origins, strict=True)]
    agree(case, "mask.logits", torch.stack(logits))
    for factor in (2, 4):
        agree(case, f"aligned_bilinear.x{factor}", aligned_upsample(case.tensors["aligned_bilinear.in"], factor))


@torch.no_grad()
def test_reidentification_head(case, model, mask, shapes):
    tensors, head = case.tensors, model.reid_head
    levels = _Levels.of(shapes, mask.device)
    arguments = (tensors["decoder.tgt"], tensors["decoder.reference"], tensors["src"], mask, tensors["valid_ratios"])
    agree(case, "reid.embedding", head(*arguments, levels))
    projection, head.projection = head.projection, torch.nn.Identity()
    try:
        agree(case, "reid.decoder", head(*arguments, levels))
    finally:
        head.projection = projection


@torch.no_grad()
def test_template_fuser(case, model):
    encoder = model.model.template_encoder
    fused = encoder.fuse([case.tensors[f"fuser.in.{level}"] for level in range(4)])
    agree(case, "fuser.out", fused)
    agree(case, "fuser.prompt", encoder.projection(fused.flatten(2).transpose(1, 2)))
