"""Names of the official checkpoint, one entry per tensor, generated from a configuration.

Because the table is generated rather than searched, it is total both ways: a tensor of the file that no entry names
is unknown, an entry that finds no tensor is missing.

Source: key names as released (MasterBin-IIAU/UNINEXT, commit 5ab0386); `model_spec` sections 12 and 17.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..configuration_uninext import UninextConfig


class Reshape(StrEnum):
    """How one official tensor becomes ours."""

    SAME = "same"
    SQUEEZE = "without its leading axis of length 1"
    SPLIT = "split into query, key and value"


@dataclass(frozen=True)
class Entry:
    """One official tensor and the parameters or buffers of ours that hold it."""

    official: str
    ours: tuple[str, ...]
    reshape: Reshape = Reshape.SAME


DROPPED: tuple[tuple[str, str], ...] = (
    (r"detr\.detr\.transformer\.decoder\.class_embed\..+", "second name of detr.detr.class_embed.*"),
    (r"detr\.detr\.transformer\.decoder\.bbox_embed\..+", "second name of detr.detr.bbox_embed.*"),
    (r"detr\.detr\.transformer\.resizer\..+", "its result is multiplied by zero in the official network"),
    (r"criterion\._iter", "counter of the BoxInst warm-up; training state, not a weight"),
    (
        r"text_encoder\.body\.model\.embeddings\.position_ids",
        "0, 1, 2, ...; saved by older text-encoder libraries only",
    ),
)
"""Official keys that have no place in our model, with the reason. `to_official` writes the second names from the
first, the resizer as a layer that outputs zero (weights and biases 0, norm weight 1), the counter as 0, and no
`position_ids`."""

IMAGE_BACKBONE = ("detr.detr.backbone.0.backbone.", "model.image_encoder.")
TEMPLATE_BACKBONE = ("detr.detr.ref_backbone.0.backbone.", "model.template_encoder.image_encoder.")
NEW_IN_STAGE_3 = ("detr.reid_embed_head.", "detr.adjust_layer.", "detr.sot_fuser.")
"""Parts that the official stage-2 to stage-3 script does not write: they start fresh."""


def drop_reason(key: str) -> str | None:
    """Why an official key has no place in our model, or `None` if it has one (or is unknown)."""
    return next((reason for pattern, reason in DROPPED if re.fullmatch(pattern, key)), None)


def second_names(key: str) -> str | None:
    """The other name under which the official checkpoint stores the same tensor, if it does."""
    for name in ("class_embed", "bbox_embed"):
        if key.startswith(f"detr.detr.{name}."):
            return key.replace("detr.detr.", "detr.detr.transformer.decoder.", 1)
    return None


def entries(config: UninextConfig) -> list[Entry]:
    """All tensors of an official checkpoint of this shape that our model holds."""
    table = [*_backbone(config, *IMAGE_BACKBONE), *_text(config), *_transformer(config), *_heads(config)]
    if config.use_template_encoder:
        table += [*_backbone(config, *TEMPLATE_BACKBONE), *_template(config)]
    if config.num_reid_layers:
        table += _reid(config)
    return table


def _pair(official: str, ours: str, reshape: Reshape = Reshape.SAME) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        yield Entry(f"{official}.{part}", (f"{ours}.{part}",), reshape)


def _pairs(official: str, ours: str, names: dict[str, str]) -> Iterator[Entry]:
    for theirs, name in names.items():
        yield from _pair(f"{official}.{theirs}", f"{ours}.{name}")


def _backbone(config: UninextConfig, official: str, ours: str) -> Iterator[Entry]:
    builders = {"resnet": _resnet, "convnext": _convnext, "vitdet": _vit}
    kind = config.backbone_config.model_type
    if kind not in builders:
        raise ValueError(
            f'"backbone_config" must be one of {", ".join(builders)} for an official checkpoint, got {kind}.'
        )
    yield from builders[kind](config.backbone_config, official, ours)


def _resnet(config, official: str, ours: str) -> Iterator[Entry]:
    def block(theirs: str, name: str) -> Iterator[Entry]:
        yield Entry(f"{official}{theirs}.weight", (f"{ours}backbone.{name}.convolution.weight",))
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield Entry(f"{official}{theirs}.norm.{part}", (f"{ours}backbone.{name}.normalization.{part}",))

    yield from block("stem.conv1", "embedder.embedder")
    for stage, depth in enumerate(config.depths):
        for layer in range(depth):
            theirs, name = f"res{stage + 2}.{layer}", f"encoder.stages.{stage}.layers.{layer}"
            if layer == 0:
                yield from block(f"{theirs}.shortcut", f"{name}.shortcut")
            for convolution in range(3):
                yield from block(f"{theirs}.conv{convolution + 1}", f"{name}.layer.{convolution}")


def _convnext(config, official: str, ours: str) -> Iterator[Entry]:
    ours = f"{ours}backbone."

    def norm(theirs: str, name: str) -> Iterator[Entry]:
        # Official norms are embeddings of one row, for its checkpoint tooling (backbone/convnext.py 36-41).
        for part in ("weight", "bias"):
            yield Entry(f"{official}{theirs}.{part}.weight", (f"{ours}{name}.{part}",), Reshape.SQUEEZE)

    yield from _pair(f"{official}downsample_layers.0.0", f"{ours}embeddings.patch_embeddings")
    yield from norm("downsample_layers.0.1", "embeddings.layernorm")
    for stage, depth in enumerate(config.depths):
        if stage:
            yield from norm(f"downsample_layers.{stage}.0", f"encoder.stages.{stage}.downsampling_layer.0")
            yield from _pair(
                f"{official}downsample_layers.{stage}.1", f"{ours}encoder.stages.{stage}.downsampling_layer.1"
            )
            yield from norm(f"norm{stage}", f"hidden_states_norms.stage{stage + 1}")
        for layer in range(depth):
            theirs, name = f"stages.{stage}.{layer}", f"encoder.stages.{stage}.layers.{layer}"
            yield from norm(f"{theirs}.norm", f"{name}.layernorm")
            yield Entry(f"{official}{theirs}.gamma.weight", (f"{ours}{name}.layer_scale_parameter",), Reshape.SQUEEZE)
            for part in ("dwconv", "pwconv1", "pwconv2"):
                yield from _pair(f"{official}{theirs}.{part}", f"{ours}{name}.{part}")


def _vit(config, official: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{official}pos_embed", (f"{ours}backbone.embeddings.position_embeddings",))
    yield from _pair(f"{official}patch_embed.proj", f"{ours}backbone.embeddings.projection")
    for layer in range(config.num_hidden_layers):
        theirs, name = f"{official}blocks.{layer}", f"{ours}backbone.encoder.layer.{layer}"
        for part in ("rel_pos_h", "rel_pos_w"):
            yield Entry(f"{theirs}.attn.{part}", (f"{name}.attention.{part}",))
        names = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "attention.qkv", "attn.proj": "attention.proj"}
        yield from _pairs(theirs, name, {**names, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
    yield from _pair(f"{official}fpn1.0", f"{ours}pyramid.upsample")


def _text(config: UninextConfig) -> Iterator[Entry]:
    official, ours = "text_encoder.body.model", "model.text_encoder"
    for part in ("word", "position", "token_type"):
        name = f"embeddings.{part}_embeddings.weight"
        yield Entry(f"{official}.{name}", (f"{ours}.{name}",))
    yield from _pair(f"{official}.embeddings.LayerNorm", f"{ours}.embeddings.LayerNorm")
    for layer in range(config.text_config.num_hidden_layers):
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ):
            name = f"encoder.layer.{layer}.{part}"
            yield from _pair(f"{official}.{name}", f"{ours}.{name}")


_DEFORMABLE = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def _mlp(official: str, ours: str, layers: int) -> Iterator[Entry]:
    for layer in range(layers):
        yield from _pair(f"{official}.layers.{layer}", f"{ours}.layers.{layer}")


def _decoder_layer(official: str, ours: str) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        targets = tuple(f"{ours}.self_attn.{name}_proj.{part}" for name in "qkv")
        yield Entry(f"{official}.self_attn.in_proj_{part}", targets, Reshape.SPLIT)
    yield from _pairs(official, ours, {f"cross_attn.{name}": f"encoder_attn.{name}" for name in _DEFORMABLE})
    names = {
        "self_attn.out_proj": "self_attn.o_proj",
        "norm1": "encoder_attn_layer_norm",
        "norm2": "self_attn_layer_norm",
        "linear1": "feed_forward.fc1",
        "linear2": "feed_forward.fc2",
        "norm3": "feed_forward.layer_norm",
    }
    yield from _pairs(official, ours, names)


def _transformer(config: UninextConfig) -> Iterator[Entry]:
    official = "detr.detr.transformer"
    for level in range(config.num_feature_levels):
        for part in (0, 1):
            yield from _pair(f"detr.detr.input_proj.{level}.{part}", f"model.input_projections.{level}.{part}")
    yield Entry(f"{official}.level_embed", ("model.level_embed",))
    yield Entry(f"{official}.tgt_embed.weight", ("model.query_embed",))
    fusion = f"{official}.encoder.vl_layers.0.b_attn"
    yield Entry(f"{fusion}.gamma_v", ("model.fusion.visual_scale",))
    yield Entry(f"{fusion}.gamma_l", ("model.fusion.prompt_scale",))
    names = {
        "layer_norm_v": "visual_layer_norm",
        "layer_norm_l": "prompt_layer_norm",
        "attn.v_proj": "visual_query",
        "attn.l_proj": "prompt_key",
        "attn.values_v_proj": "visual_value",
        "attn.values_l_proj": "prompt_value",
        "attn.out_v_proj": "visual_output",
        "attn.out_l_proj": "prompt_output",
    }
    yield from _pairs(fusion, "model.fusion", names)
    for layer in range(config.encoder_layers):
        names = {f"self_attn.{name}": f"self_attn.{name}" for name in _DEFORMABLE}
        names |= {"norm1": "self_attn_layer_norm", "norm2": "feed_forward.layer_norm"}
        names |= {"linear1": "feed_forward.fc1", "linear2": "feed_forward.fc2"}
        yield from _pairs(f"{official}.encoder.layers.{layer}", f"model.encoder.layers.{layer}", names)
    names = {"enc_output": "projection", "enc_output_norm": "layer_norm"}
    yield from _pairs(official, "model.proposals", names)
    for layer in range(config.decoder_layers):
        yield from _decoder_layer(f"{official}.decoder.layers.{layer}", f"model.decoder.layers.{layer}")
    yield from _mlp(f"{official}.decoder.ref_point_head", "model.decoder.reference_head", 2)


def _heads(config: UninextConfig) -> Iterator[Entry]:
    last = config.decoder_layers
    for layer in range(last):
        official, ours = f"detr.detr.class_embed.{layer}", f"alignment_heads.{layer}"
        for theirs, name in (("log_scale", "log_scale"), ("bias_lang", "text_bias"), ("bias0", "bias")):
            yield Entry(f"{official}.{theirs}", (f"{ours}.{name}",))
        yield from _pair(f"{official}.dot_product_projection_text", f"{ours}.text_projection")
        yield from _mlp(f"detr.detr.bbox_embed.{layer}", f"model.decoder.box_heads.{layer}", 3)
        yield from _pair(f"detr.detr.iou_head.{layer}", f"iou_heads.{layer}")
    # The last entry of both lists serves the encoder proposals; its class head sees no prompt.
    yield from _pair(f"detr.detr.class_embed.{last}.body", "model.proposals.class_head")
    yield from _mlp(f"detr.detr.bbox_embed.{last}", "model.proposals.box_head", 3)
    yield from _mlp("detr.controller", "mask_controller", 3)
    names = {
        "lay3": "from_stride_32",
        "lay4": "from_stride_16",
        "jia_dcn": "from_stride_8",
        "lay1": "reduce",
        "lay2": "output",
    }
    yield from _pairs("detr.mask_head", "mask_branch", names)
    names = {"fc": "projection", "layer_norm": "layer_norm"}
    yield from _pairs("detr.resizer", "denoising_label_projection", names)


def _template(config: UninextConfig) -> Iterator[Entry]:
    yield from _pair("detr.adjust_layer", "model.template_encoder.projection")
    for level in range(config.num_feature_levels):
        yield from _pair(f"detr.sot_fuser.refine.{level}", f"model.template_encoder.fuser.{level}")


def _reid(config: UninextConfig) -> Iterator[Entry]:
    for layer in range(config.num_reid_layers):
        yield from _decoder_layer(f"detr.reid_embed_head.0.layers.{layer}", f"reid_head.layers.{layer}")
    yield from _mlp("detr.reid_embed_head.0.ref_point_head", "reid_head.reference_head", 2)
    yield from _mlp("detr.reid_embed_head.1", "reid_head.projection", 3)
