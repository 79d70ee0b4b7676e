"""Every intermediate value of a forward pass against a recorded case."""

import torch

from uninext_hf import Instances
from uninext_hf.box_ops_uninext import rle_to_mask
from uninext_hf.modeling_uninext import UninextForUniversalPerception, UninextImageFeatures, UninextPromptFeatures


def agree(case, name: str, value: torch.Tensor, **tolerances) -> float:
    """Compare at the case's defaults (rtol 1e-3, atol 1e-4); returns the largest difference."""
    report = case.check(name, value, **tolerances)
    assert report.ok(), str(report)
    return report.max_abs


def check_picture(case, prefix: str, model: UninextForUniversalPerception, pixels: torch.Tensor) -> dict[str, float]:
    """Backbone maps and projections."""
    maps = model.model.image_encoder(pixels)
    found = {f"backbone.res{stage}": maps[stage - 3] for stage in (3, 4, 5)}
    found |= {f"input_proj.{level}": value for level, value in enumerate(model.model.input_projections(maps))}
    return {name: agree(case, prefix + name, value) for name, value in found.items()}


def check_network(
    case,
    prefix: str,
    model: UninextForUniversalPerception,
    image: UninextImageFeatures,
    prompt: UninextPromptFeatures,
    proposal_indices: torch.Tensor | None = None,
    outputs: bool = True,
    part: str = "all",
) -> dict[str, float]:
    """Fusion to masks.

    `part`: "all"; "before" the selection of proposals; or "after" it, with `proposal_indices` injected.
    """
    trunk = model.model(
        image_features=image, prompt_features=prompt, proposal_indices=proposal_indices, output_hidden_states=True
    )
    pooled = bool(trunk.pool_prompt.all())
    memory = trunk.encoder_last_hidden_state
    anchors, usable = model.model.proposals.anchors(image.mask, image.valid_ratios, image.spatial_shapes)
    states = model.model.proposals.project(memory, usable)
    before = {"fusion.visual": trunk.fused_image_tokens, "fusion.lang": trunk.fused_prompt_tokens, "memory": memory}
    before |= {f"encoder.{layer}": state for layer, state in enumerate(trunk.encoder_hidden_states[1:])}
    before |= {
        "twostage.class_logit": trunk.proposal_logits,
        "twostage.coord_unact": model.model.proposals.box_head(states) + anchors,
    }
    layers = range(model.config.decoder_layers)
    hidden, boxes = trunk.intermediate_hidden_states, trunk.intermediate_reference_boxes
    logits = torch.stack([model.score(layer, hidden[:, layer], trunk) for layer in layers])
    ious = torch.stack([model.iou_heads[layer](hidden[:, layer]).squeeze(-1) for layer in layers])
    result = model(
        image_features=image, prompt_features=prompt, proposal_indices=proposal_indices, output_masks=outputs
    )
    after = {
        "twostage.reference": boxes[:, 0],
        "decoder.hidden": hidden.transpose(0, 1),
        "decoder.reference": boxes[:, 1:].transpose(0, 1),
        "layers.logits": logits[..., :1] if pooled else logits,
        "layers.boxes": boxes[:, 1:].transpose(0, 1),
        "layers.iou_logit": ious,
        "mask.features": result.mask_features,
        "mask.params": result.mask_kernels,
    }
    if outputs:
        masks = result.pred_masks
        after |= {
            "out.pred_logits": result.logits[..., :1] if pooled else result.logits,
            "out.pred_boxes": result.pred_boxes,
            "out.pred_iou": result.pred_ious[..., None],
            "out.mask_reference_points": result.reference_points,
            "out.mask_mean": masks.flatten(2).mean(-1),
            "out.mask_std": masks.flatten(2).std(-1),
            "out.mask_positive_fraction": (masks > 0).flatten(2).float().mean(-1),
            "out.mask_lowres": masks[:, :: case.meta[f"{prefix}out.mask_lowres_query_step"]],
        }
        if result.query_embeddings is not None:
            after["out.reid_embed"] = result.query_embeddings
    found = {"all": before | after, "before": before, "after": after}[part]
    recorded = set(case.names())
    differences = {}
    for name, value in found.items():
        if prefix + name in recorded:
            # The share of pixels above zero is a mask: up to 0.1 % of them may fall on the other side.
            tolerances = {"atol": 1e-3} if name.endswith("positive_fraction") else {}
            differences[name] = agree(case, prefix + name, value, **tolerances)
    if part == "all":
        selected = case.tensors.get(f"{prefix}twostage.topk_index")
        assert selected is None or torch.equal(trunk.proposal_indices, selected.long())
    return differences


def check_instances(case, prefix: str, found: Instances) -> dict[str, float]:
    """Scores to 1e-5, boxes to 0.01 px, equal labels; masks (the first ones are recorded) but for 0.1 % of pixels."""
    tensors = case.tensors
    assert len(found) == len(tensors[f"{prefix}scores"])
    assert torch.equal(found.labels, tensors[f"{prefix}labels"].long())
    recorded = [torch.as_tensor(rle_to_mask(rle)) for rle in case.meta[f"{prefix}mask_rle"]]
    masks = [(mask != other).float().mean() for mask, other in zip(found.masks, recorded, strict=False)]
    areas = (found.masks.sum((1, 2)) - tensors[f"{prefix}mask_area"]).abs() / found.masks[0].numel()
    differences = {
        "scores": float((found.scores - tensors[f"{prefix}scores"]).abs().max()),
        "boxes (pixels)": float((found.boxes - tensors[f"{prefix}boxes"]).abs().max()),
        "masks (share of pixels)": float(max(masks)),
        "mask areas (share of pixels)": float(areas.max()),
    }
    for (name, value), bound in zip(differences.items(), (1e-5, 1e-2, 1e-3, 1e-3), strict=True):
        assert value <= bound, f"{prefix}{name}: {value}"
    return {f"final {name}": value for name, value in differences.items()}
