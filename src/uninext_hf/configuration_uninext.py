"""Configuration of UNINEXT: what decides the shape of the weights, and the named presets.

Thresholds of inference and tracking are not here; they sit next to the code that reads them.

Sources: Yan et al., "Universal Instance Perception as Object Discovery and Retrieval", CVPR 2023; the official keys
named below are those of `projects/UNINEXT/uninext/config.py` and the released YAML files.
"""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class UninextConfig(PreTrainedConfig):
    r"""Shape of a UNINEXT model. `UninextConfig()` is the released ResNet-50 video model (stage 3).

    Args:
        backbone_config (`dict | PreTrainedConfig`, *optional*, defaults to ResNet-50 with strides 8, 16, 32):
            Any backbone that `AutoBackbone` can build (timm ones through `timm_backbone`). It gives either several
            maps, the first at stride 8, each next at twice the stride; or a single map at stride 16, from which a
            three-map pyramid is made (plain vision transformers).
            Official: `MODEL.BACKBONE`, `MODEL.RESNETS`, `MODEL.CONVNEXT`, `MODEL.VIT`.
        text_config (`dict | PreTrainedConfig`, *optional*, defaults to BERT-base):
            Any BERT-like text encoder that `AutoModel` can build. Official: `MODEL.LANGUAGE_BACKBONE`.
        d_model (`int`, defaults to 256):
            Width of picture tokens and queries, in channels; a multiple of 4 and of both head counts.
            Official: `MODEL.DDETRS.HIDDEN_DIM`.
        encoder_layers (`int`, defaults to 6): Number of encoder layers. Official: `MODEL.DDETRS.ENC_LAYERS`.
        encoder_attention_heads (`int`, defaults to 8): Heads per encoder layer. Official: `MODEL.DDETRS.NHEADS`.
        encoder_ffn_dim (`int`, defaults to 2048): Hidden width of the encoder's feed-forward part, in channels.
            Official: `MODEL.DDETRS.DIM_FEEDFORWARD`.
        encoder_n_points (`int`, defaults to 4): Samples per head and feature level in the encoder.
            Official: `MODEL.DDETRS.ENC_N_POINTS`.
        decoder_layers (`int`, defaults to 6): Number of decoder layers. Official: `MODEL.DDETRS.DEC_LAYERS`.
        decoder_attention_heads (`int`, defaults to 8): Heads per decoder layer. Official: `MODEL.DDETRS.NHEADS`.
        decoder_ffn_dim (`int`, defaults to 2048): Hidden width of the decoder's feed-forward part, in channels.
            Official: `MODEL.DDETRS.DIM_FEEDFORWARD`.
        decoder_n_points (`int`, defaults to 4): Samples per head and feature level in the decoder.
            Official: `MODEL.DDETRS.DEC_N_POINTS`.
        num_feature_levels (`int`, defaults to 4): Feature levels the transformer sees; levels beyond the backbone's
            maps are made by convolutions of stride 2. At least 3. Official: `MODEL.DDETRS.NUM_FEATURE_LEVELS`.
        num_queries (`int`, defaults to 900): Proposals taken from the encoder, and learned query contents.
            Official: `MODEL.DDETRS.TWO_STAGE_NUM_PROPOSALS`.
        dropout (`float`, defaults to 0.0): Drop probability in encoder, decoder, re-identification layers and the
            denoising label projection. Official: `MODEL.DDETRS.DROPOUT`.
        fusion_dim (`int`, defaults to 2048): Width of the early fusion between picture and prompt, in channels.
            Official: `MODEL.DDETRS.VL_HIDDEN_DIM`.
        fusion_attention_heads (`int`, defaults to 8): Heads of the early fusion. Official: fixed to 8.
        fusion_dropout (`float`, defaults to 0.1): Drop probability of both attention maps of the early fusion;
            independent of `dropout`. Official: fixed to 0.1.
        mask_feature_dim (`int`, defaults to 8): Channels of the mask features, and of the hidden layers of the
            dynamic mask head. Official: fixed to 8.
        mask_head_layers (`int`, defaults to 3): 1x1 convolutions of the dynamic mask head, their weights predicted per
            query. Official: `MODEL.DDETRS.CTRL_LAYERS`.
        use_template_encoder (`bool`, defaults to `True`): Whether there is a branch for reference pictures (box or
            mask prompts). Video models have it, image models do not. Official: `SOT.EXTRA_BACKBONE_FOR_TEMPLATE`.
        num_reid_layers (`int`, defaults to 2): Decoder layers of the re-identification head; 0 for none, as in image
            models. Official: `N_LAYER_DEFORMABLE_REID`.
        frozen_stages (`int`, defaults to 0): Leading stages of the picture backbone that get no gradient: 0 none,
            1 the stem, 2 the stem and the first stage. Official: `MODEL.BACKBONE.FREEZE_AT` (2 in image models).
        class_prior (`float`, defaults to 0.01): Score that the class and IoU heads start with, in (0, 1).
            Official: `MODEL.DYHEAD.PRIOR_PROB`.
        layer_norm_eps (`float`, defaults to 1e-5): Added to the variance in the layer norms of the transformer.
        msda_implementation (`str`, defaults to `"auto"`): Path of the deformable-attention op: `"auto"`, or a name
            from `deformable_attention_uninext.available_implementations()`. Changes speed, not results.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has the wrong type, or two fields do not fit together.
    """

    model_type = "uninext"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(AutoConfig, model_type="resnet", init_kwargs={"out_indices": [2, 3, 4]}),
        "text_config": SubConfigSpec(AutoConfig, model_type="bert"),
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    decoder_n_points: int = 4
    num_feature_levels: int = 4
    num_queries: int = 900
    dropout: float | int = 0.0
    fusion_dim: int = 2048
    fusion_attention_heads: int = 8
    fusion_dropout: float | int = 0.1
    mask_feature_dim: int = 8
    mask_head_layers: int = 3
    use_template_encoder: bool = True
    num_reid_layers: int = 2
    frozen_stages: int = 0
    class_prior: float = 0.01
    layer_norm_eps: float = 1e-5
    msda_implementation: str = "auto"
    tie_word_embeddings: bool = False
    is_encoder_decoder: bool = True

    def validate_architecture(self):
        """Refuse sizes that cannot be built, naming the field, the rule and the value."""
        positive = (
            "d_model encoder_layers encoder_attention_heads encoder_ffn_dim encoder_n_points decoder_layers "
            "decoder_attention_heads decoder_ffn_dim decoder_n_points num_queries fusion_dim fusion_attention_heads "
            "mask_feature_dim mask_head_layers"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f'"{name}" must be at least 1, got {getattr(self, name)}.')
        if self.d_model % 4:
            raise ValueError(f'"d_model" must be a multiple of 4 (two sine codes per axis), got {self.d_model}.')
        for width, heads in (
            ("d_model", "encoder_attention_heads"),
            ("d_model", "decoder_attention_heads"),
            ("fusion_dim", "fusion_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                values = f"{getattr(self, width)} and {getattr(self, heads)}"
                raise ValueError(f'"{width}" must be a multiple of "{heads}", got {values}.')
        if self.num_feature_levels < 3:
            raise ValueError(
                f'"num_feature_levels" must be at least 3 (the mask branch reads strides 8, 16 and 32), '
                f"got {self.num_feature_levels}."
            )
        for name in ("dropout", "fusion_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'"{name}" must be in [0, 1), got {getattr(self, name)}.')
        if not 0 < self.class_prior < 1:
            raise ValueError(f'"class_prior" must be in (0, 1), got {self.class_prior}.')
        for name in ("num_reid_layers", "frozen_stages"):
            if getattr(self, name) < 0:
                raise ValueError(f'"{name}" must not be negative, got {getattr(self, name)}.')

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "UninextConfig":
        """Configuration of a named preset.

        Args:
            name: one of `PRESETS`.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f'"name" must be one of {", ".join(PRESETS)}, got {name!r}.')
        return cls(**{**copy.deepcopy(PRESETS[name]), **overrides})


_CONVNEXT_LARGE = {
    "model_type": "convnext",
    "depths": [3, 3, 27, 3],
    "hidden_sizes": [192, 384, 768, 1536],
    "layer_scale_init_value": 1.0,
    "drop_path_rate": 0.7,
    "out_indices": [2, 3, 4],
}
_VIT_HUGE = {
    "model_type": "vitdet",
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 1024,
    "pretrain_image_size": 224,
    "use_relative_position_embeddings": True,
    "window_size": 14,
    # Official: the list was written for a 12-block network (backbone/vit.py:411-421), so blocks 2, 5, 8, 11 and all
    # of 12 to 31 are global. The released weights were trained that way.
    "window_block_indices": [0, 1, 3, 4, 6, 7, 9, 10],
    "drop_path_rate": 0.5,
    "out_indices": [32],
}
_TINY_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
_TINY_TEXT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_IMAGE = {"use_template_encoder": False, "num_reid_layers": 0}
_REFERENCE = {
    "text_config": {"model_type": "bert", "num_hidden_layers": 2, "intermediate_size": 256},
    "encoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_layers": 3,
    "decoder_ffn_dim": 128,
    "num_queries": 110,
    "fusion_dim": 256,
}

PRESETS: dict[str, dict] = {
    "r50": {},
    "convnext-large": {"backbone_config": _CONVNEXT_LARGE},
    "vit-huge": {"backbone_config": _VIT_HUGE},
    "r50-image": {**_IMAGE, "frozen_stages": 2},
    "convnext-large-image": {"backbone_config": _CONVNEXT_LARGE, **_IMAGE},
    "vit-huge-image": {"backbone_config": _VIT_HUGE, **_IMAGE},
    "tiny": {
        "backbone_config": _TINY_BACKBONE,
        "text_config": _TINY_TEXT,
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "encoder_n_points": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "decoder_n_points": 2,
        "num_queries": 20,
        "fusion_dim": 32,
        "fusion_attention_heads": 4,
        "num_reid_layers": 1,
    },
    "reference-tiny-video": {**_REFERENCE, "num_reid_layers": 1},
    "reference-tiny-image": {**_REFERENCE, **_IMAGE, "frozen_stages": 2},
}
"""Fields of each preset that differ from `UninextConfig()`. `reference-*` are the reduced models whose values were
recorded from the official implementation; `tiny` is ours, for fast tests."""

__all__ = ["PRESETS", "UninextConfig"]
