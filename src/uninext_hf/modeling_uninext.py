"""The UNINEXT network: every module that has parameters, in reading order.

    picture  -> backbone -> level projections ------------------+
    text     -> BERT ----------------+                          +-> early fusion -> deformable encoder
    template -> 4-channel backbone --+-> prompt tokens ---------+         -> proposals -> decoder -> heads

The network knows tensors only. Prompts become tensors in `processing_uninext.py`, outputs become `Instances` there.

Sources: Yan et al., "Universal Instance Perception as Object Discovery and Retrieval", CVPR 2023, section 3, and the
official implementation MasterBin-IIAU/UNINEXT (commit 5ab0386). File names below are relative to its
`projects/UNINEXT/uninext/models/`; TR = `deformable_detr/deformable_transformer_dino.py`,
DETR = `deformable_detr/deformable_detr.py`, VDN = `ddetrs_vid_dn.py`, DN = `ddetrs_dn.py`.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import load_backbone
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_uninext import UninextConfig
from .deformable_attention_uninext import MultiScaleDeformableAttention, SpatialShapes
from .mask_head_uninext import aligned_upsample, dynamic_mask_logits, num_kernel_values

TOKEN_CHUNK = 1024
"""Picture tokens per block of the feed-forward layers at inference."""
LOGIT_BOUND = 50000.0
"""Class logits and fusion scores are clamped to this (DETR:35-68, `fuse_helper.py`); pooled rows hold its negative in
the columns they do not use."""


class UninextImageFeatures(NamedTuple):
    """What the network needs of `B` pictures; computed once, reusable with any prompt, never modified.

    Attributes:
        tokens: (B, S, d_model) projected feature maps, level after level, rows first.
        positions: (B, S, d_model) position code plus level embedding.
        mask: (B, S) bool, `True` for real picture, `False` for padding.
        valid_ratios: (B, levels, 2) float32 share of width and height that is real picture.
        input_sizes: (B, 2) int64 height and width of the un-padded network input, pixels.
        spatial_shapes: height and width of each level, Python numbers.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    valid_ratios: Tensor
    input_sizes: Tensor
    spatial_shapes: SpatialShapes

    def rows(self, index: Tensor) -> "UninextImageFeatures":
        """Features of one picture per prompt row; `index` (P,) holds picture numbers."""
        return self._replace(
            tokens=self.tokens.index_select(0, index),
            positions=self.positions.index_select(0, index),
            mask=self.mask.index_select(0, index),
            valid_ratios=self.valid_ratios.index_select(0, index),
            input_sizes=self.input_sizes.index_select(0, index),
        )


class UninextPromptFeatures(NamedTuple):
    """What the network needs of `P` prompt rows; computed once, reusable with any picture, never modified.

    Attributes:
        hidden: (P, L, text width) prompt tokens: last layer of the text encoder, or the template tokens.
        valid: (P, L) bool, tokens that are pooled.
        attend: (P, L) bool, tokens that picture tokens attend to in the fusion. Text: as `valid`. Template: all its
            own slots, padded ones included, as in the official code, where a boolean mask had no effect
            (`fuse_helper.py` 96-107).
        pool: (P,) bool, whether the row is scored by its pooled prompt (expression, template) or per token.
    """

    hidden: Tensor
    valid: Tensor
    attend: Tensor
    pool: Tensor


class _Levels(NamedTuple):
    """Level sizes as Python numbers, and as tensors for compiled kernels."""

    shapes: SpatialShapes
    shapes_tensor: Tensor
    starts_tensor: Tensor

    @classmethod
    def of(cls, shapes: SpatialShapes, device: torch.device) -> "_Levels":
        starts, start = [], 0
        for height, width in shapes:
            starts.append(start)
            start = start + height * width
        return cls(
            shapes,
            torch.tensor([list(shape) for shape in shapes], dtype=torch.int64, device=device),
            torch.tensor(starts, dtype=torch.int64, device=device),
        )


@dataclass
class UninextEncoderOutput(ModelOutput):
    """Output of the deformable encoder.

    Args:
        last_hidden_state: (P, S, d_model) picture tokens after the last layer.
        hidden_states: one such tensor per layer and the input, with `output_hidden_states=True`.
        attentions: (P, S, heads, levels, points) sampling weights per layer, with `output_attentions=True`.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class UninextDecoderOutput(ModelOutput):
    """Output of the decoder.

    Args:
        last_hidden_state: (P, Q, d_model) queries after the last layer.
        intermediate_hidden_states: (P, layers, Q, d_model) queries after every layer.
        intermediate_reference_boxes: (P, layers + 1, Q, 4) boxes (cx, cy, w, h relative to the un-padded input):
            the one that enters each layer, and the one after the last.
        hidden_states: queries per layer and the input, with `output_hidden_states=True`.
        attentions: self-attention weights per layer, with `output_attentions=True`.
        cross_attentions: sampling weights per layer, with `output_attentions=True`.
    """

    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_reference_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class UninextModelOutput(ModelOutput):
    """Output of the trunk, P prompt rows.

    Args:
        last_hidden_state: (P, Q, d_model) queries after the decoder.
        intermediate_hidden_states: (P, layers, Q, d_model).
        intermediate_reference_boxes: (P, layers + 1, Q, 4) cx, cy, w, h relative to the un-padded input.
        encoder_last_hidden_state: (P, S, d_model) picture tokens after the encoder ("memory").
        fused_image_tokens: (P, S, d_model) picture tokens after the early fusion, before the encoder.
        fused_prompt_tokens: (P, L, text width) prompt tokens after the early fusion.
        prompt_valid: (P, L) int64, 1 for tokens that are pooled.
        pool_prompt: (P,) int64, 1 for rows scored by their pooled prompt.
        proposal_logits: (P, S) score of every encoder position.
        proposal_indices: (P, Q) encoder positions that became queries.
        input_sizes: (P, 2) un-padded height and width of the network input, pixels.
        encoder_hidden_states, decoder_hidden_states: per layer, with `output_hidden_states=True`.
        encoder_attentions, decoder_attentions, cross_attentions: per layer, with `output_attentions=True`.
    """

    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_reference_boxes: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    fused_image_tokens: Tensor | None = None
    fused_prompt_tokens: Tensor | None = None
    prompt_valid: Tensor | None = None
    pool_prompt: Tensor | None = None
    proposal_logits: Tensor | None = None
    proposal_indices: Tensor | None = None
    input_sizes: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class UninextOutput(ModelOutput):
    """Raw predictions, P prompt rows (P = number of pictures unless `image_index` was given).

    Args:
        loss: `None`, as losses are not part of this version.
        loss_dict: `None` likewise.
        logits: (P, Q, L) class scores before sigmoid, one per prompt token; pooled rows use column 0 and hold -50000
            elsewhere. Columns of padding tokens hold no information.
        pred_boxes: (P, Q, 4) cx, cy, w, h relative to the un-padded input.
        pred_ious: (P, Q) IoU score before sigmoid.
        pred_masks: (P, Q, 2 * ceil(H / 8), 2 * ceil(W / 8)) mask logits, with `output_masks=True`.
        mask_kernels: (P, Q, 169) weights of the dynamic mask head.
        mask_features: (P, 8, ceil(H / 8), ceil(W / 8)).
        query_embeddings: (P, Q, d_model) for re-identification, un-normalised (models with that head).
        reference_points: (P, Q, 2) x, y relative to the un-padded input: origin of the mask coordinates.
        input_sizes: (P, 2) un-padded height and width of the network input, pixels.
        proposal_indices: (P, Q) encoder positions that became queries.
        last_hidden_state: (P, Q, d_model) queries after the decoder.
        encoder_last_hidden_state: (P, S, d_model).
        encoder_hidden_states, decoder_hidden_states: per layer, with `output_hidden_states=True`.
        encoder_attentions, decoder_attentions, cross_attentions: per layer, with `output_attentions=True`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_ious: Tensor | None = None
    pred_masks: Tensor | None = None
    mask_kernels: Tensor | None = None
    mask_features: Tensor | None = None
    query_embeddings: Tensor | None = None
    reference_points: Tensor | None = None
    input_sizes: Tensor | None = None
    proposal_indices: Tensor | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


# Functions and small layers


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of a value clamped to [0, 1], with both sides of the ratio at least `eps` (`util/misc.py` 493-497)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _sine_code(angles: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """(...) angles -> (..., features), sine and cosine interleaved, float32."""
    exponent = torch.arange(features, device=angles.device, dtype=torch.float32)
    exponent = 2 * torch.div(exponent, 2, rounding_mode="floor") / features
    phases = angles[..., None] / temperature**exponent
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], dim=-1).flatten(-2)


def position_code(mask: Tensor, features: int) -> Tensor:
    """Sine position code of one level, y first.

    Args:
        mask: (B, h, w) bool, `True` for real picture.
        features: channels; half of them for each axis.

    Returns:
        (B, h * w, features) float32. Source: `position_encoding.py` 36-56.
    """
    codes = []
    for dim in (1, 2):
        index = mask.cumsum(dim, dtype=torch.float32)
        last = index[:, -1:] if dim == 1 else index[:, :, -1:]
        codes.append(_sine_code((index - 0.5) / (last + 1e-6) * (2 * math.pi), features // 2))
    return torch.cat(codes, dim=-1).flatten(1, 2)


def box_code(boxes: Tensor, features: int) -> Tensor:
    """Sine code of boxes: (..., 4) cx, cy, w, h -> (..., 4 * features) float32, ordered y, x, w, h (TR:612-646)."""
    x, y, width, height = (boxes.float() * (2 * math.pi)).unbind(-1)
    return torch.cat([_sine_code(part, features) for part in (y, x, width, height)], dim=-1)


def _xavier(*layers: nn.Linear | nn.Conv2d, zero_bias: bool = True) -> None:
    for layer in layers:
        init.xavier_uniform_(layer.weight)
        if zero_bias:
            init.zeros_(layer.bias)


def _prior_logit(prior: float) -> float:
    return -math.log((1 - prior) / prior)


class UninextMLP(nn.Module):
    """Linear layers with ReLU between them (DETR, `MLP`)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, num_layers: int):
        super().__init__()
        widths = [inputs, *[hidden] * (num_layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class UninextFrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine values are buffers, so that no mode and no optimiser can change them.

    Args:
        norm: the layer it replaces; its epsilon, and the activation that timm's layers hold, are kept.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.eps = norm.eps
        self.activation = getattr(norm, "act", None)
        device = None if norm.running_mean is None else norm.running_mean.device
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((norm.num_features,), fill, device=device))

    def initialize(self) -> None:
        for name in ("weight", "running_var"):
            init.ones_(getattr(self, name))
        for name in ("bias", "running_mean"):
            init.zeros_(getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            # In training the plain affine form keeps nothing but the scale for the backward pass.
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            x = x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return x if self.activation is None else self.activation(x)


def _freeze_batch_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, UninextFrozenBatchNorm2d(child))
        else:
            _freeze_batch_norms(child)


# Picture encoder


class UninextPyramid(nn.Module):
    """Three maps (strides 8, 16, 32) from one stride-16 map of a plain vision transformer (`backbone/vit.py`)."""

    def __init__(self, channels: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        self.channels = [channels // 2, channels, channels]

    def forward(self, feature_map: Tensor) -> tuple[Tensor, ...]:
        return self.upsample(feature_map), feature_map, F.max_pool2d(feature_map, kernel_size=2, stride=2)


class UninextImageEncoder(nn.Module):
    """Backbone with frozen batch norms, giving maps at strides 8, 16, 32.

    Args:
        config: the model's configuration.
        num_channels: channels of the picture: 3, or 4 for a reference picture with its rasterised target.
        frozen_stages: leading stages without gradient.
    """

    def __init__(self, config: UninextConfig, num_channels: int = 3, frozen_stages: int = 0):
        super().__init__()
        backbone_config = config.backbone_config
        if num_channels != 3:
            # The picture branch shares its configuration with the model, this one differs from it.
            backbone_config = copy.deepcopy(backbone_config)
            backbone_config.num_channels = num_channels
        self.backbone = load_backbone(backbone_config)
        _freeze_batch_norms(self.backbone)
        channels = list(self.backbone.channels)
        self.pyramid = UninextPyramid(channels[0]) if len(channels) == 1 else None
        self.channels = channels if self.pyramid is None else self.pyramid.channels
        self.frozen_stages = frozen_stages
        self.freeze()

    def freeze(self) -> None:
        """Switch the gradient of the frozen stages off."""
        stages = self.frozen_stages
        if not stages:
            return
        stem = getattr(self.backbone, "embedder", None) or getattr(self.backbone, "embeddings", None)
        layers = getattr(getattr(self.backbone, "encoder", None), "stages", None)
        if stem is None or layers is None or stages > 1 + len(layers):
            raise ValueError(
                f'"frozen_stages" must be 0 for a {type(self.backbone).__name__}, or at most the number of stages of '
                f"a backbone that has a stem and a list of stages, got {stages}."
            )
        for module in [stem, *layers][:stages]:
            module.requires_grad_(False)

    def initialize(self) -> None:
        # The backbone is a model of its own and is initialised by its own rules, which know nothing of our norms.
        for module in self.backbone.modules():
            if isinstance(module, UninextFrozenBatchNorm2d):
                module.initialize()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) normalised pixels -> maps (B, channels, h, w), finest first."""
        maps = tuple(self.backbone(pixel_values).feature_maps)
        return maps if self.pyramid is None else self.pyramid(maps[0])


class UninextLevelProjections(nn.ModuleList):
    """Backbone maps -> `num_feature_levels` maps of `d_model` channels, for pictures and templates (DETR:215-230).

    Levels beyond the backbone's maps come from convolutions of stride 2: the first from the *raw* last map, not from
    its projection, each next from the one before.
    """

    def __init__(self, config: UninextConfig, channels: list[int]):
        if len(channels) > config.num_feature_levels:
            raise ValueError(
                f'"num_feature_levels" must be at least the number of backbone maps, '
                f"got {config.num_feature_levels} for {len(channels)} maps."
            )
        # 32 groups as official; at least two channels in each, or a 1x1 map could not be normalised.
        width, groups = config.d_model, math.gcd(32, config.d_model // 2)
        layers = []
        for level in range(config.num_feature_levels):
            if level < len(channels):
                convolution = nn.Conv2d(channels[level], width, kernel_size=1)
            else:
                inputs = channels[-1] if level == len(channels) else width
                convolution = nn.Conv2d(inputs, width, kernel_size=3, stride=2, padding=1)
            layers.append(nn.Sequential(convolution, nn.GroupNorm(groups, width)))
        super().__init__(layers)
        self.num_maps = len(channels)

    def initialize(self) -> None:
        _xavier(*(layer[0] for layer in self))

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        levels = [layer(feature_map) for layer, feature_map in zip(self, maps, strict=False)]
        source = maps[-1]
        for layer in list(self)[self.num_maps :]:
            source = layer(source)
            levels.append(source)
        return levels


# Template encoder


class UninextTemplateEncoder(nn.Module):
    """Reference picture with its target as fourth channel -> prompt tokens (VDN:139-273, 880-906)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.image_encoder = UninextImageEncoder(config, num_channels=4)
        self.fuser = nn.ModuleList(
            nn.Conv2d(config.d_model, config.d_model, kernel_size=3, padding=1)
            for _ in range(config.num_feature_levels)
        )
        self.projection = nn.Linear(config.d_model, config.text_config.hidden_size)

    def fuse(self, levels: list[Tensor]) -> Tensor:
        """Levels (P, d_model, h / 2**l, w / 2**l) -> their sum at the finest one, (P, d_model, h, w)."""
        fused = self.fuser[0](levels[0])
        for level, (convolution, source) in enumerate(zip(self.fuser[1:], levels[1:], strict=True), start=1):
            fused = fused + aligned_upsample(convolution(source), 2**level)[..., : fused.shape[-2], : fused.shape[-1]]
        return fused

    def forward(
        self, template_values: Tensor, template_mask: Tensor, projections: UninextLevelProjections
    ) -> tuple[Tensor, Tensor]:
        """Encode crops.

        Args:
            template_values: (P, 4, S, S) normalised colours and rasterised target.
            template_mask: (P, S, S) bool, `True` inside the picture the crop was taken from.
            projections: the picture branch's projections.

        Returns:
            Tokens (P, S/8 * S/8, text width) and, for each, whether it lies inside the picture.
        """
        fused = self.fuse(projections(self.image_encoder(template_values)))
        inside = F.interpolate(template_mask[:, None].float(), size=fused.shape[-2:])[:, 0] > 0.5
        return self.projection(fused.flatten(2).transpose(1, 2)), inside.flatten(1)


# Early fusion


class UninextEarlyFusion(nn.Module):
    """Bidirectional cross-attention between picture and prompt tokens, once, before the encoder.

    The residual is the *normalised* input, not the raw one. Padded picture positions are attended to, and padded
    prompt rows are computed, both as in the official code (`fuse_helper.py` 96-179, `vlfusion.py` 77-85).
    """

    def __init__(self, config: UninextConfig):
        super().__init__()
        visual, text, width = config.d_model, config.text_config.hidden_size, config.fusion_dim
        self.num_heads = config.fusion_attention_heads
        self.head_dim = width // self.num_heads
        self.dropout = config.fusion_dropout
        self.initial_scale = 1 / config.encoder_layers
        self.visual_layer_norm = nn.LayerNorm(visual, eps=config.layer_norm_eps)
        self.prompt_layer_norm = nn.LayerNorm(text, eps=config.layer_norm_eps)
        self.visual_query = nn.Linear(visual, width)
        self.prompt_key = nn.Linear(text, width)
        self.visual_value = nn.Linear(visual, width)
        self.prompt_value = nn.Linear(text, width)
        self.visual_output = nn.Linear(width, visual)
        self.prompt_output = nn.Linear(width, text)
        self.visual_scale = nn.Parameter(torch.full((visual,), self.initial_scale))
        self.prompt_scale = nn.Parameter(torch.full((text,), self.initial_scale))

    def initialize(self) -> None:
        _xavier(self.visual_query, self.prompt_key, self.visual_value)
        _xavier(self.prompt_value, self.visual_output, self.prompt_output)
        init.constant_(self.visual_scale, self.initial_scale)
        init.constant_(self.prompt_scale, self.initial_scale)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _maps(self, scores: Tensor, attend: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (..., S, L) -> attention over prompt tokens, and over picture positions; never in half precision."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).clamp(-LOGIT_BOUND, LOGIT_BOUND)
        hidden = torch.finfo(torch.float32).min
        return scores.masked_fill(~attend, hidden).softmax(-1), scores.softmax(-2)

    def plain(self, visual: Tensor, prompt: Tensor, attend: Tensor) -> tuple[Tensor, Tensor]:
        """Both updates as written in the paper, before the output scales; arguments are the normalised tokens."""
        query = self._heads(self.visual_query(visual)) * self.head_dim**-0.5
        key = self._heads(self.prompt_key(prompt))
        to_prompt, to_visual = self._maps(query @ key.transpose(-1, -2), attend[:, None, None])
        dropout = self.dropout if self.training else 0.0
        to_prompt = F.dropout(to_prompt, dropout).to(visual.dtype)
        to_visual = F.dropout(to_visual, dropout).to(visual.dtype)
        visual_update = to_prompt @ self._heads(self.prompt_value(prompt))
        prompt_update = to_visual.transpose(-1, -2) @ self._heads(self.visual_value(visual))
        return (
            self.visual_output(visual_update.transpose(1, 2).flatten(2)),
            self.prompt_output(prompt_update.transpose(1, 2).flatten(2)),
        )

    def folded(self, visual: Tensor, prompt: Tensor, attend: Tensor) -> tuple[Tensor, Tensor]:
        """The same updates with the picture-side projections folded into the few prompt tokens.

        `(Wq v) . k = v . (Wq^T k)`, `Wo (A Vl) = A (Wo Vl)` and `Al (Wv v) = (Al v) Wv^T`, so that no tensor of
        S x fusion width exists. Rows of `Al` sum to one, so the value bias is added once; this is why dropout on the
        attention maps needs the plain form.
        """
        heads, dim, width = self.num_heads, self.head_dim, visual.shape[-1]
        key = self._heads(self.prompt_key(prompt)) * dim**-0.5
        query_weight = self.visual_query.weight.view(heads, dim, width)
        folded_query = (key @ query_weight).transpose(-1, -2)
        query_bias = (key * self.visual_query.bias.view(heads, 1, dim)).sum(-1)
        output_weight = self.visual_output.weight.view(width, heads, dim).permute(1, 2, 0)
        folded_value = self._heads(self.prompt_value(prompt)) @ output_weight
        value_weight = self.visual_value.weight.view(heads, dim, width).transpose(-1, -2)
        visual_update, prompt_updates = self.visual_output.bias, []
        # Head by head: the (S, L) scores of one head stay near the cache, those of all heads would not.
        for head in range(heads):
            scores = torch.baddbmm(query_bias[:, head, None], visual, folded_query[:, head])
            to_prompt, to_visual = self._maps(scores, attend[:, None])
            visual_update = visual_update + to_prompt.to(visual.dtype) @ folded_value[:, head]
            prompt_updates.append((to_visual.to(visual.dtype).transpose(-1, -2) @ visual) @ value_weight[head])
        prompt_update = torch.cat(prompt_updates, dim=-1) + self.visual_value.bias
        return visual_update, self.prompt_output(prompt_update)

    def forward(self, visual: Tensor, prompt: Tensor, attend: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange information between both sides; the inputs are left untouched.

        Args:
            visual: (P, S, d_model).
            prompt: (P, L, text width).
            attend: (P, L) bool, prompt tokens that picture tokens may attend to.

        Returns:
            Updated tokens of the same shapes.
        """
        visual, prompt = self.visual_layer_norm(visual), self.prompt_layer_norm(prompt)
        # Per picture token, plain costs three projections to the fusion width that folding saves; folding multiplies
        # the width of the scores' inner product by d_model / head_dim.
        saved = visual.shape[-1] * self.num_heads * self.head_dim
        added = prompt.shape[1] * self.num_heads * max(0, visual.shape[-1] - self.head_dim)
        pays = saved > added and visual.shape[1] > prompt.shape[1]
        update = self.folded if pays and not (self.training and self.dropout) else self.plain
        visual_update, prompt_update = update(visual, prompt, attend)
        return visual + self.visual_scale * visual_update, prompt + self.prompt_scale * prompt_update


# Attention layers


class UninextDeformableAttention(nn.Module):
    """Projections around the deformable-attention op; locations and weights are float32 in every mode."""

    def __init__(self, config: UninextConfig, num_heads: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_points, self.num_levels = num_heads, num_points, config.num_feature_levels
        samples = num_heads * self.num_levels * num_points
        self.sampling_offsets = nn.Linear(config.d_model, samples * 2)
        self.attention_weights = nn.Linear(config.d_model, samples)
        self.value_proj = nn.Linear(config.d_model, config.d_model)
        self.output_proj = nn.Linear(config.d_model, config.d_model)
        self.attn = MultiScaleDeformableAttention(config.msda_implementation)

    def initialize(self) -> None:
        # Heads look in different directions, points of a head ever further out.
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]
        init.copy_(self.sampling_offsets.bias, offsets.expand(-1, self.num_levels, -1, -1).reshape(-1))
        for tensor in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            init.zeros_(tensor)
        _xavier(self.value_proj, self.output_proj)

    def forward(
        self, queries: Tensor, references: Tensor, values: Tensor, value_mask: Tensor, levels: _Levels
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            queries: (P, Q, d_model), position code included.
            references: (P, Q, levels, 2) points or (P, Q, levels, 4) boxes, relative to the padded levels, float32.
            values: (P, S, d_model).
            value_mask: (P, S) bool, `False` rows count as zero.
            levels: sizes of the levels in `values`.

        Returns:
            (P, Q, d_model), and the attention weights (P, Q, heads, levels, points).
        """
        shape = (*queries.shape[:2], self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(values).masked_fill(~value_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(queries).float().view(*shape, 2)
        weights = self.attention_weights(queries).float().view(*shape[:3], -1).softmax(-1).view(shape)
        if references.shape[-1] == 2:
            scale = levels.shapes_tensor.flip(-1)[:, None].to(offsets.dtype)
            locations = references[:, :, None, :, None] + offsets / scale
        else:
            scale = references[:, :, None, :, None, 2:] * (0.5 / self.num_points)
            locations = references[:, :, None, :, None, :2] + offsets * scale
        output = self.attn(
            value, levels.shapes_tensor, levels.shapes, levels.starts_tensor, locations, weights, im2col_step=64
        )
        return self.output_proj(output), weights


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention written out; (P, heads, Q, dim) in, (P, Q, heads, dim) and the weights out."""
    scores = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UninextSelfAttention(nn.Module):
    """Attention among queries; positions are added to queries and keys, not to values."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // config.decoder_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def initialize(self) -> None:
        # Official: one packed (3 d, d) matrix, hence the bound of that shape.
        width = self.q_proj.in_features
        bound = math.sqrt(6 / (4 * width))
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            init.uniform_(layer.weight, -bound, bound)
            init.zeros_(layer.bias)
        init.zeros_(self.o_proj.bias)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = hidden_states + positions
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            self.q_proj(queries).view(shape).transpose(1, 2),
            self.k_proj(queries).view(shape).transpose(1, 2),
            self.v_proj(hidden_states).view(shape).transpose(1, 2),
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class UninextFeedForward(nn.Module):
    """Two linear layers with ReLU, residual and norm."""

    def __init__(self, config: UninextConfig, hidden: int):
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.d_model, hidden)
        self.fc2 = nn.Linear(hidden, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        # Without gradient the hidden tensor of one chunk fits the cache, and the one of all tokens would not.
        if x.shape[1] <= TOKEN_CHUNK or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(x)
        return torch.cat([self._run(chunk) for chunk in x.split(TOKEN_CHUNK, dim=1)], dim=1)

    def _run(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.fc1(x).relu_(), self.dropout, self.training)
        return self.layer_norm(x + F.dropout(self.fc2(hidden), self.dropout, self.training))


class UninextEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention over picture tokens, then feed-forward; norms after the residuals (TR:330-370)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = UninextDeformableAttention(config, config.encoder_attention_heads, config.encoder_n_points)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = UninextFeedForward(config, config.encoder_ffn_dim)

    def initialize(self) -> None:
        _xavier(self.feed_forward.fc1, self.feed_forward.fc2, zero_bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        references: Tensor,
        mask: Tensor,
        levels: _Levels,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        update, _ = self.self_attn(hidden_states + positions, references, hidden_states, mask, levels)
        update = F.dropout(update, self.dropout, self.training)
        return self.feed_forward(self.self_attn_layer_norm(hidden_states + update))


class UninextDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, deformable cross-attention, feed-forward; norms after the residuals (TR:373-460)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = UninextSelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.encoder_attn = UninextDeformableAttention(config, config.decoder_attention_heads, config.decoder_n_points)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = UninextFeedForward(config, config.decoder_ffn_dim)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        references: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        levels: _Levels,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """One step; `references` (P, Q, levels, 4) are boxes relative to the padded levels."""
        update, _ = self.self_attn(hidden_states, positions, attention_mask, **kwargs)
        update = F.dropout(update, self.dropout, self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states + update)
        update, _ = self.encoder_attn(hidden_states + positions, references, memory, memory_mask, levels)
        update = F.dropout(update, self.dropout, self.training)
        return self.feed_forward(self.encoder_attn_layer_norm(hidden_states + update))


# Encoder, proposals, decoder


class UninextPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all UNINEXT models."""

    config: UninextConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    prompt_features_class = UninextPromptFeatures
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UninextImageEncoder", "UninextEncoderLayer", "UninextDecoderLayer", "UninextEarlyFusion"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, which forgets which parameters were frozen."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        for module in model.modules():
            if isinstance(module, UninextImageEncoder):
                module.freeze()
        return result

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Official: layers that no rule names keep torch's defaults (DETR:204-278).
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                fan_in = module.weight[0].numel() if module.weight.dim() > 1 else 1
                bound = 1 / math.sqrt(fan_in)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def initialize_weights(self) -> None:
        """Initialise whatever no checkpoint filled: the parts first, then the rules of what they are parts of.

        The library visits modules that own tensors themselves; rules of a layer about its parts (`initialize`) come
        after, innermost first. All of them leave loaded tensors alone.
        """
        super().initialize_weights()
        with torch.no_grad():
            for module in reversed(list(self.modules())):
                if hasattr(module, "initialize"):
                    module.initialize()


class UninextEncoder(UninextPreTrainedModel):
    """Deformable encoder over the tokens of all levels."""

    _can_record_outputs = {
        "hidden_states": UninextEncoderLayer,
        "attentions": OutputRecorder(UninextDeformableAttention, index=1, layer_name="self_attn"),
    }

    def __init__(self, config: UninextConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(UninextEncoderLayer(config) for _ in range(config.encoder_layers))
        self.post_init()

    @staticmethod
    def reference_points(shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
        """Pixel centres of all levels, (P, S, levels, 2) relative to each padded level, float32 (TR:289-301)."""
        points = []
        for level, (height, width) in enumerate(shapes):
            ys = torch.arange(height, device=valid_ratios.device, dtype=torch.float32) + 0.5
            xs = torch.arange(width, device=valid_ratios.device, dtype=torch.float32) + 0.5
            ys = ys / (valid_ratios[:, level, 1:] * height)
            xs = xs / (valid_ratios[:, level, :1] * width)
            grid = torch.stack([xs[:, None].expand(-1, height, -1), ys[..., None].expand(-1, -1, width)], dim=-1)
            points.append(grid.flatten(1, 2))
        return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        mask: Tensor,
        valid_ratios: Tensor,
        levels: _Levels,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UninextEncoderOutput:
        """(P, S, d_model) tokens, their positions, mask (P, S), ratios (P, levels, 2) -> tokens after each layer."""
        references = self.reference_points(levels.shapes, valid_ratios)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, references, mask, levels, **kwargs)
        return UninextEncoderOutput(last_hidden_state=hidden_states)


class UninextProposalGenerator(nn.Module):
    """Scores every encoder position without any prompt and turns the best ones into boxes (TR:132-224)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.class_prior = config.class_prior
        self.projection = nn.Linear(config.d_model, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.class_head = nn.Linear(config.d_model, 1)
        self.box_head = UninextMLP(config.d_model, config.d_model, 4, 3)

    def initialize(self) -> None:
        _xavier(self.projection, zero_bias=False)
        init.constant_(self.class_head.bias, _prior_logit(self.class_prior))
        init.zeros_(self.box_head.layers[-1].weight)
        init.zeros_(self.box_head.layers[-1].bias)

    @staticmethod
    def anchors(mask: Tensor, valid_ratios: Tensor, shapes: SpatialShapes) -> tuple[Tensor, Tensor]:
        """One box per position, 0.05 * 2**level of the un-padded picture wide and high.

        Args:
            mask: (P, S) bool, `True` for real picture.
            valid_ratios: (P, levels, 2) float32.
            shapes: level sizes.

        Returns:
            (P, S, 4) float32 boxes before sigmoid, infinite where unusable, and (P, S) bool which are usable: inside
            the picture and every coordinate in (0.01, 0.99).
        """
        boxes = []
        for level, (height, width) in enumerate(shapes):
            ratio = valid_ratios[:, level]
            ys = torch.arange(height, device=mask.device, dtype=torch.float32) + 0.5
            xs = torch.arange(width, device=mask.device, dtype=torch.float32) + 0.5
            # Counted, not measured: rounding makes the ratio times the size an integer again.
            ys = (ys / (ratio[:, 1:] * height).round())[..., None].expand(-1, -1, width)
            xs = (xs / (ratio[:, :1] * width).round())[:, None].expand(-1, height, -1)
            side = torch.full_like(xs, 0.05 * 2.0**level)
            boxes.append(torch.stack([xs, ys, side, side], dim=-1).flatten(1, 2))
        anchors = torch.cat(boxes, dim=1)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & mask
        return torch.log(anchors / (1 - anchors)).masked_fill(~usable[..., None], math.inf), usable

    def project(self, memory: Tensor, usable: Tensor) -> Tensor:
        """Encoder states -> proposal states, both (P, S, d_model); unusable rows enter as zero."""
        return self.layer_norm(self.projection(memory.masked_fill(~usable[..., None], 0.0)))

    def forward(
        self, memory: Tensor, mask: Tensor, valid_ratios: Tensor, shapes: SpatialShapes, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose proposals.

        Args:
            memory: (P, S, d_model) encoder states.
            mask: (P, S) bool.
            valid_ratios: (P, levels, 2).
            shapes: level sizes.
            indices: (P, Q) positions to use instead of the best-scored ones.

        Returns:
            Boxes (P, Q, 4) cx, cy, w, h relative to the un-padded picture, float32, with gradient; their positions
            (P, Q); and the scores before sigmoid of all positions (P, S). Q is `num_queries`, or the number of
            positions where a tiny picture has fewer (there the official code fails in its top-k). Unusable positions
            are not suppressed: all of them share one score, and one that is chosen becomes the box (1, 1, 1, 1).
        """
        anchors, usable = self.anchors(mask, valid_ratios, shapes)
        states = self.project(memory, usable)
        logits = self.class_head(states).float().squeeze(-1)
        if indices is None:
            indices = logits.topk(min(self.num_queries, logits.shape[1]), dim=1).indices
        chosen = states.gather(1, indices[..., None].expand(-1, -1, states.shape[-1]))
        anchors = anchors.gather(1, indices[..., None].expand(-1, -1, 4))
        return (self.box_head(chosen).float() + anchors).sigmoid(), indices, logits


class UninextDecoder(UninextPreTrainedModel):
    """Decoder with iterative box refinement, looking forward twice (TR:373-501). No norm after the last layer."""

    _can_record_outputs = {
        "hidden_states": UninextDecoderLayer,
        "attentions": OutputRecorder(UninextSelfAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(UninextDeformableAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: UninextConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(UninextDecoderLayer(config) for _ in range(config.decoder_layers))
        self.reference_head = UninextMLP(2 * config.d_model, config.d_model, config.d_model, 2)
        self.box_heads = nn.ModuleList(
            UninextMLP(config.d_model, config.d_model, 4, 3) for _ in range(config.decoder_layers)
        )
        self.post_init()

    def initialize(self) -> None:
        for layer in self.layers:
            _initialize_decoder_layer(layer)
        _xavier(*self.reference_head.layers, zero_bias=False)
        for head in self.box_heads:
            init.zeros_(head.layers[-1].weight)
            init.zeros_(head.layers[-1].bias)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        hidden_states: Tensor,
        reference_boxes: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        valid_ratios: Tensor,
        levels: _Levels,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UninextDecoderOutput:
        """Refine queries and boxes.

        Args:
            hidden_states: (P, Q, d_model) query contents.
            reference_boxes: (P, Q, 4) cx, cy, w, h relative to the un-padded picture, float32.
            memory: (P, S, d_model) encoder states.
            memory_mask: (P, S) bool.
            valid_ratios: (P, levels, 2).
            levels: level sizes.
            attention_mask: additive (P or 1, 1, Q, Q), which queries may see which.
            kwargs: what transformers models accept, such as `output_hidden_states`.
        """
        boxes, entering = [reference_boxes], reference_boxes
        states = []
        for layer, box_head in zip(self.layers, self.box_heads, strict=True):
            references = _references_per_level(entering, valid_ratios)
            positions = self.reference_head(_query_code(references, hidden_states))
            hidden_states = layer(
                hidden_states, positions, references, memory, memory_mask, levels, attention_mask, **kwargs
            )
            refined = (box_head(hidden_states).float() + inverse_sigmoid(entering)).sigmoid()
            states.append(hidden_states)
            # Look forward twice: the kept box carries gradient into the layer before, the one handed on does not.
            boxes.append(refined)
            entering = refined.detach()
        return UninextDecoderOutput(
            last_hidden_state=hidden_states,
            intermediate_hidden_states=torch.stack(states, dim=1),
            intermediate_reference_boxes=torch.stack(boxes, dim=1),
        )


def _references_per_level(boxes: Tensor, valid_ratios: Tensor) -> Tensor:
    """(P, Q, 4) boxes relative to the un-padded picture -> (P, Q, levels, 4) relative to the padded levels."""
    return boxes[:, :, None] * torch.cat([valid_ratios, valid_ratios], dim=-1)[:, None]


def _query_code(references: Tensor, like: Tensor) -> Tensor:
    """Sine code of the boxes as level 0 sees them, (P, Q, 2 * d_model) in the dtype of the queries."""
    return box_code(references[:, :, 0], like.shape[-1] // 2).to(like.dtype)


def _initialize_decoder_layer(layer: UninextDecoderLayer) -> None:
    _xavier(layer.self_attn.o_proj)
    _xavier(layer.feed_forward.fc1, layer.feed_forward.fc2, zero_bias=False)


# Heads


class UninextAlignmentHead(nn.Module):
    """Class scores: scaled inner product of queries and fused prompt tokens (DETR:35-68)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.class_prior = config.class_prior
        text = config.text_config.hidden_size
        self.text_projection = nn.Linear(text, config.d_model)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.text_bias = nn.Parameter(torch.zeros(text))
        self.bias = nn.Parameter(torch.full((1,), _prior_logit(config.class_prior)))

    def initialize(self) -> None:
        init.zeros_(self.log_scale)
        init.zeros_(self.text_bias)
        init.constant_(self.bias, _prior_logit(self.class_prior))

    def forward(self, queries: Tensor, prompt: Tensor) -> Tensor:
        """(P, Q, d_model) queries and (P, L, text width) prompt tokens -> (P, Q, L) logits, float32."""
        prompt = F.normalize(prompt, dim=-1)
        tokens = self.text_projection(prompt / 2)
        bias = (prompt @ self.text_bias + self.bias).float()
        logits = (queries @ tokens.transpose(-1, -2)).float() / self.log_scale.float().exp() + bias[:, None]
        return logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)


class UninextMaskBranch(nn.Module):
    """Mask features from the encoder's maps at strides 8, 16 and 32 (DN:923-1031)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        width, narrow = config.d_model, max(config.d_model // 4, 1)

        def convolution(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)

        self.from_stride_32 = convolution(width, width)
        self.from_stride_16 = convolution(width, width)
        self.from_stride_8 = convolution(width, width)
        self.reduce = convolution(width, narrow)
        self.output = convolution(narrow, config.mask_feature_dim)

    def initialize(self) -> None:
        for layer in self.children():
            init.kaiming_uniform_(layer.weight, a=1)
            init.zeros_(layer.bias)

    def forward(self, memory: Tensor, shapes: SpatialShapes) -> Tensor:
        """(P, S, d_model) encoder states -> (P, mask_feature_dim, h, w) at stride 8."""
        maps, start = [], 0
        for height, width in shapes[:3]:
            part = memory[:, start : start + height * width].transpose(1, 2)
            maps.append(part.unflatten(-1, (height, width)))
            start = start + height * width
        x = self.from_stride_32(maps[2]).relu()
        x = maps[1] + F.interpolate(x, size=maps[1].shape[-2:], mode="nearest")
        x = self.from_stride_16(x).relu()
        x = maps[0] + F.interpolate(x, size=maps[0].shape[-2:], mode="nearest")
        x = self.from_stride_8(x).relu()
        return self.output(self.reduce(x).relu()).relu()


class UninextReidHead(nn.Module):
    """Embeddings that tell instances apart over time: a few decoder layers at fixed boxes, then an MLP (VDN:36-49)."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        width = config.d_model
        self.layers = nn.ModuleList(UninextDecoderLayer(config) for _ in range(config.num_reid_layers))
        self.reference_head = UninextMLP(2 * width, width, width, 2)
        self.projection = UninextMLP(width, width, width, 3)

    def forward(
        self,
        queries: Tensor,
        boxes: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        valid_ratios: Tensor,
        levels: _Levels,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """(P, Q, d_model) last decoder states and (P, Q, 4) last boxes -> (P, Q, d_model), un-normalised.

        Everything that comes in is detached: the losses on embeddings train this head only.
        """
        hidden_states, memory = queries.detach(), memory.detach()
        references = _references_per_level(boxes.detach(), valid_ratios)
        positions = self.reference_head(_query_code(references, hidden_states))
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, references, memory, memory_mask, levels, **kwargs)
        return self.projection(hidden_states)


class UninextLabelProjection(nn.Module):
    """Pooled prompt -> content of the denoising queries (`detr.resizer`); used in training only."""

    def __init__(self, config: UninextConfig):
        super().__init__()
        self.dropout = config.dropout
        self.projection = nn.Linear(config.text_config.hidden_size, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=1e-12)

    def forward(self, prompt: Tensor) -> Tensor:
        """(P, text width) -> (P, d_model)."""
        return F.dropout(self.layer_norm(self.projection(prompt)), self.dropout, self.training)


# Models


def pool_prompt_tokens(hidden: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid tokens, [CLS] and [SEP] included: (P, L, width), (P, L) of 0 and 1 -> (P, width)."""
    weights = valid.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


class UninextModel(UninextPreTrainedModel):
    """Trunk: pictures and prompts in, refined queries and boxes out."""

    def __init__(self, config: UninextConfig):
        super().__init__(config)
        self.image_encoder = UninextImageEncoder(config, frozen_stages=config.frozen_stages)
        self.input_projections = UninextLevelProjections(config, self.image_encoder.channels)
        self.text_encoder = _build_text_encoder(config)
        self.template_encoder = UninextTemplateEncoder(config) if config.use_template_encoder else None
        self.fusion = UninextEarlyFusion(config)
        self.level_embed = nn.Parameter(torch.zeros(config.num_feature_levels, config.d_model))
        self.encoder = UninextEncoder(config)
        self.proposals = UninextProposalGenerator(config)
        self.query_embed = nn.Parameter(torch.zeros(config.num_queries, config.d_model))
        self.decoder = UninextDecoder(config)
        self.post_init()

    def initialize(self) -> None:
        """Fill the parameters that the trunk itself owns."""
        init.normal_(self.level_embed)
        init.xavier_uniform_(self.query_embed)

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text encoder."""
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text encoder."""
        self.text_encoder.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> UninextImageFeatures:
        """Run the picture branch, once per picture whatever the number of prompts.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, padded at the right and bottom.
            pixel_mask: (B, H, W), non-zero for real pixels; `None` when nothing is padded.

        Raises:
            ValueError: the backbone's first map is not at stride 8.
        """
        height, width = pixel_values.shape[-2:]
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones((pixel_values.shape[0], height, width))
        pixel_mask = pixel_mask.to(torch.float32)
        levels = self.input_projections(self.image_encoder(pixel_values.to(self.dtype)))
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        if not torch.compiler.is_compiling() and shapes[0] != (math.ceil(height / 8), math.ceil(width / 8)):
            raise ValueError(
                f'"backbone_config" must give its first map at stride 8, got a {shapes[0][0]}x{shapes[0][1]} map '
                f"for {height}x{width} pixels."
            )
        masks, positions, ratios = [], [], []
        for index, (shape, level_embed) in enumerate(zip(shapes, self.level_embed, strict=True)):
            # Official: masks of extra levels are sampled from the stride-8 mask, not from the picture's (DN:136-137).
            source = pixel_mask if index < self.input_projections.num_maps else masks[0].float()
            mask = F.interpolate(source[:, None], size=shape)[:, 0] > 0.5
            masks.append(mask)
            positions.append(position_code(mask, self.config.d_model) + level_embed.float())
            valid_height, valid_width = mask[:, :, 0].sum(1), mask[:, 0].sum(1)
            ratios.append(torch.stack([valid_width / shape[1], valid_height / shape[0]], dim=-1))
        real = pixel_mask > 0.5
        return UninextImageFeatures(
            tokens=torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1),
            positions=torch.cat(positions, dim=1).to(levels[0].dtype),
            mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack(ratios, dim=1).float(),
            input_sizes=torch.stack([real[:, :, 0].sum(1), real[:, 0].sum(1)], dim=-1),
            spatial_shapes=shapes,
        )

    def get_prompt_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        template_values: Tensor | None = None,
        template_mask: Tensor | None = None,
        pool_prompt: Tensor | None = None,
    ) -> UninextPromptFeatures:
        """Run the text branch, the template branch, or both.

        In a batch of mixed kinds every row has both sets of tensors; a row whose `template_mask` is all zero is text.

        Args:
            input_ids: (P, L) text tokens.
            attention_mask: (P, L), 1 for real tokens; `None` for all.
            template_values: (P, 4, S, S) normalised colours and rasterised target; (P, T, 4, S, S) for T references
                to each target, whose tokens are joined along L.
            template_mask: (P, S, S) or (P, T, S, S), non-zero inside the picture; `None` for all. References after
                the first whose mask is all zero are no references: nothing attends to or pools them.
            pool_prompt: (P,) bool, score the row by its pooled prompt. `None`: template rows are, text rows are not.

        Raises:
            ValueError: neither kind is given, or templates for a model without template branch.
        """
        if input_ids is None and template_values is None:
            raise ValueError('Either "input_ids" or "template_values" must be given, got neither.')
        text = template = None
        if input_ids is not None:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            valid = attention_mask.bool()
            text = UninextPromptFeatures(hidden, valid, valid, torch.zeros_like(valid[:, 0]))
        if template_values is not None:
            if self.template_encoder is None:
                raise ValueError(
                    '"template_values" need a model with "use_template_encoder=True" (a video checkpoint); this one '
                    "has no branch for reference pictures."
                )
            if template_mask is None:
                template_mask = torch.ones_like(template_values[..., 0, :, :])
            template_mask = template_mask.bool()
            template = self._template_features(template_values, template_mask)
        if text is not None and template is not None:
            features = _choose_rows(template_mask.flatten(1).any(1), template, text)
        else:
            features = text if template is None else template
        return features if pool_prompt is None else features._replace(pool=pool_prompt.bool())

    def _template_features(self, values: Tensor, mask: Tensor) -> UninextPromptFeatures:
        """Crops (P, 4, S, S) or (P, T, 4, S, S) and their masks -> the tokens of each row's references, joined."""
        if values.dim() == 4:
            values, mask = values[:, None], mask[:, None]
        hidden, valid = self.template_encoder(
            values.flatten(0, 1).to(self.dtype), mask.flatten(0, 1), self.input_projections
        )
        rows, references = mask.shape[:2]
        given = mask.flatten(2).any(2)
        given = torch.cat([torch.ones_like(given[:, :1]), given[:, 1:]], dim=1)
        return UninextPromptFeatures(
            hidden=hidden.unflatten(0, (rows, references)).flatten(1, 2),
            valid=valid.unflatten(0, (rows, references)).flatten(1, 2),
            attend=given.repeat_interleave(hidden.shape[1], dim=1),
            pool=torch.ones_like(given[:, 0]),
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        template_values: Tensor | None = None,
        template_mask: Tensor | None = None,
        pool_prompt: Tensor | None = None,
        image_features: UninextImageFeatures | None = None,
        prompt_features: UninextPromptFeatures | None = None,
        image_index: Tensor | None = None,
        proposal_indices: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UninextModelOutput:
        """Find instances of P prompt rows in B pictures.

        Args:
            pixel_values: (B, 3, H, W), see `get_image_features`.
            pixel_mask: (B, H, W).
            input_ids: (P, L), see `get_prompt_features`.
            attention_mask: (P, L).
            template_values: (P, 4, S, S) or (P, T, 4, S, S).
            template_mask: (P, S, S) or (P, T, S, S).
            pool_prompt: (P,) bool.
            image_features: result of `get_image_features`, instead of pixels.
            prompt_features: result of `get_prompt_features`, instead of prompt tensors.
            image_index: (P,) the picture each prompt row looks at. `None`: one prompt per picture in order, or all
                prompts on the only picture.
            proposal_indices: (P, Q) encoder positions to use as proposals instead of the best-scored ones.
            kwargs: what transformers models accept, such as `output_hidden_states`.

        Raises:
            ValueError: not exactly one of pixels and features, or of prompt tensors and features, is given; or rows
                and pictures do not fit together.
        """
        image_features, prompt_features = self._gather_features(
            pixel_values,
            pixel_mask,
            image_features,
            prompt_features,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "template_values": template_values,
                "template_mask": template_mask,
                "pool_prompt": pool_prompt,
            },
        )
        image = _expand_to_rows(image_features, prompt_features.hidden.shape[0], image_index)
        levels = _Levels.of(image.spatial_shapes, image.tokens.device)
        visual, prompt = self.fusion(image.tokens, prompt_features.hidden, prompt_features.attend)
        encoded = self.encoder(visual, image.positions, image.mask, image.valid_ratios, levels, **kwargs)
        memory = encoded.last_hidden_state
        boxes, indices, proposal_logits = self.proposals(
            memory, image.mask, image.valid_ratios, image.spatial_shapes, proposal_indices
        )
        # Contents are learned per rank of the proposal; the prompt does not enter them (TR:230-245).
        queries = self.query_embed[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        decoded = self.decoder(queries, boxes, memory, image.mask, image.valid_ratios, levels, **kwargs)
        return UninextModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            intermediate_reference_boxes=decoded.intermediate_reference_boxes,
            encoder_last_hidden_state=memory,
            fused_image_tokens=visual,
            fused_prompt_tokens=prompt,
            prompt_valid=prompt_features.valid.long(),
            pool_prompt=prompt_features.pool.long(),
            proposal_logits=proposal_logits,
            proposal_indices=indices,
            input_sizes=image.input_sizes,
            encoder_hidden_states=encoded.hidden_states,
            decoder_hidden_states=decoded.hidden_states,
            encoder_attentions=encoded.attentions,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )

    def _gather_features(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        image_features: UninextImageFeatures | None,
        prompt_features: UninextPromptFeatures | None,
        prompt: dict[str, Tensor | None],
    ) -> tuple[UninextImageFeatures, UninextPromptFeatures]:
        if (pixel_values is None) == (image_features is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f'Exactly one of "pixel_values" and "image_features" must be given, got {given}.')
        if (prompt["input_ids"] is None and prompt["template_values"] is None) == (prompt_features is None):
            given = "neither" if prompt_features is None else "both"
            raise ValueError(
                f'Exactly one of prompt tensors ("input_ids", "template_values") and "prompt_features" must be given, '
                f"got {given}."
            )
        if image_features is None:
            image_features = self.get_image_features(pixel_values, pixel_mask)
        if prompt_features is None:
            prompt_features = self.get_prompt_features(**prompt)
        return image_features, prompt_features


def _build_text_encoder(config: UninextConfig) -> PreTrainedModel:
    model_class = AutoModel._model_mapping[type(config.text_config)]
    # A pooler would be a head that nothing reads; not every text encoder has one to switch off.
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return AutoModel.from_config(config.text_config, **({"add_pooling_layer": False} if takes_pooler else {}))


def _choose_rows(first: Tensor, a: UninextPromptFeatures, b: UninextPromptFeatures) -> UninextPromptFeatures:
    """Rows of `a` where `first` (P,) holds, else rows of `b`; the shorter one gets slots that nothing looks at."""
    length = max(a.hidden.shape[1], b.hidden.shape[1])

    def pad(x: Tensor) -> Tensor:
        missing = length - x.shape[1]
        return F.pad(x, (0, 0, 0, missing) if x.dim() == 3 else (0, missing))

    return UninextPromptFeatures(
        torch.where(first[:, None, None], pad(a.hidden), pad(b.hidden)),
        torch.where(first[:, None], pad(a.valid), pad(b.valid)),
        torch.where(first[:, None], pad(a.attend), pad(b.attend)),
        torch.where(first, a.pool, b.pool),
    )


def _expand_to_rows(image: UninextImageFeatures, rows: int, index: Tensor | None) -> UninextImageFeatures:
    pictures = image.tokens.shape[0]
    if index is not None:
        if index.shape != (rows,):
            raise ValueError(
                f'"image_index" must have shape ({rows},), one picture per prompt, got {tuple(index.shape)}.'
            )
        return image.rows(index.to(image.tokens.device))
    if rows == pictures:
        return image
    if pictures == 1:
        return image.rows(torch.zeros(rows, dtype=torch.int64, device=image.tokens.device))
    raise ValueError(
        f'"image_index" must be given when prompts and pictures differ in number, got {rows} prompts and {pictures} '
        "pictures."
    )


class UninextForUniversalPerception(UninextPreTrainedModel):
    """UNINEXT with all its heads: scores, boxes, IoU scores, masks and embeddings for any prompt."""

    def __init__(self, config: UninextConfig):
        super().__init__(config)
        width = config.d_model
        self.model = UninextModel(config)
        self.alignment_heads = nn.ModuleList(UninextAlignmentHead(config) for _ in range(config.decoder_layers))
        self.iou_heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(config.decoder_layers))
        kernel_values = num_kernel_values(config.mask_feature_dim, config.mask_head_layers)
        self.mask_controller = UninextMLP(width, width, kernel_values, 3)
        self.mask_branch = UninextMaskBranch(config)
        self.reid_head = UninextReidHead(config) if config.num_reid_layers else None
        self.denoising_label_projection = UninextLabelProjection(config)
        self.post_init()

    def initialize(self) -> None:
        """Rules about the heads that are plain layers."""
        for head in self.iou_heads:
            init.constant_(head.bias, _prior_logit(self.config.class_prior))
        _xavier(*self.mask_controller.layers)

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text encoder."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text encoder."""
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> UninextImageFeatures:
        """See `UninextModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_mask)

    def get_prompt_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        template_values: Tensor | None = None,
        template_mask: Tensor | None = None,
        pool_prompt: Tensor | None = None,
    ) -> UninextPromptFeatures:
        """See `UninextModel.get_prompt_features`."""
        return self.model.get_prompt_features(
            input_ids, attention_mask, template_values, template_mask, pool_prompt=pool_prompt
        )

    def score(self, layer: int, queries: Tensor, trunk: UninextModelOutput) -> Tensor:
        """Class logits (P, Q, L) of the queries after decoder layer `layer`.

        Pooled rows are scored by the mean of their fused prompt, in column 0. Pooling comes before the head, not
        after: the head normalises its prompt input, so the order changes the numbers.
        """
        prompt, pool = trunk.fused_prompt_tokens, trunk.pool_prompt.bool()[:, None, None]
        pooled = pool_prompt_tokens(prompt, trunk.prompt_valid)
        first = torch.where(pool, pooled[:, None], prompt[:, :1])
        logits = self.alignment_heads[layer](queries, torch.cat([first, prompt[:, 1:]], dim=1))
        unused = torch.arange(prompt.shape[1], device=logits.device) > 0
        return logits.masked_fill(pool & unused, -LOGIT_BOUND)

    def decode_masks(self, outputs: UninextOutput) -> Tensor:
        """Mask logits (P, Q, 2h, 2w) of all queries; `dynamic_mask_logits` does the same for chosen ones."""
        origins = outputs.reference_points * outputs.input_sizes.flip(-1)[:, None]
        rows = zip(outputs.mask_kernels, outputs.mask_features, origins, strict=True)
        return torch.stack([dynamic_mask_logits(*row) for row in rows])

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        template_values: Tensor | None = None,
        template_mask: Tensor | None = None,
        pool_prompt: Tensor | None = None,
        image_features: UninextImageFeatures | None = None,
        prompt_features: UninextPromptFeatures | None = None,
        image_index: Tensor | None = None,
        proposal_indices: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_masks: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UninextOutput:
        """Find instances of P prompt rows in B pictures.

        Args:
            pixel_values: (B, 3, H, W), see `UninextModel.get_image_features`.
            pixel_mask: (B, H, W).
            input_ids: (P, L), see `UninextModel.get_prompt_features`.
            attention_mask: (P, L).
            template_values: (P, 4, S, S) or (P, T, 4, S, S).
            template_mask: (P, S, S) or (P, T, S, S).
            pool_prompt: (P,) bool.
            image_features: result of `get_image_features`, instead of pixels.
            prompt_features: result of `get_prompt_features`, instead of prompt tensors.
            image_index: (P,) the picture each prompt row looks at. `None`: one prompt per picture in order, or all
                prompts on the only picture.
            proposal_indices: (P, Q) encoder positions to use as proposals instead of the best-scored ones.
            labels: must be `None`; losses are not part of this version.
            output_masks: also decode the masks of all queries. Post-processing does not need them: it decodes those
                it keeps.
            kwargs: what transformers models accept, such as `output_hidden_states`.

        Raises:
            ValueError: not exactly one of pixels and features, or of prompt tensors and features, is given; or
                labels are.
        """
        if labels is not None:
            # Ignoring them would let a training script run and learn nothing.
            raise ValueError('"labels" must be None, as losses are not part of this version, got labels.')
        prompt = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "template_values": template_values,
            "template_mask": template_mask,
            "pool_prompt": pool_prompt,
        }
        image_features, prompt_features = self.model._gather_features(
            pixel_values, pixel_mask, image_features, prompt_features, prompt
        )
        trunk = self.model(
            image_features=image_features,
            prompt_features=prompt_features,
            image_index=image_index,
            proposal_indices=proposal_indices,
            **kwargs,
        )
        image = _expand_to_rows(image_features, prompt_features.hidden.shape[0], image_index)
        queries, memory = trunk.last_hidden_state, trunk.encoder_last_hidden_state
        boxes = trunk.intermediate_reference_boxes
        embeddings = None
        if self.reid_head is not None:
            levels = _Levels.of(image.spatial_shapes, memory.device)
            embeddings = self.reid_head(
                queries, boxes[:, -1], memory, image.mask, image.valid_ratios, levels, **kwargs
            )
        outputs = UninextOutput(
            logits=self.score(-1, queries, trunk),
            pred_boxes=boxes[:, -1],
            pred_ious=self.iou_heads[-1](queries).float().squeeze(-1),
            mask_kernels=self.mask_controller(queries),
            mask_features=self.mask_branch(memory, image.spatial_shapes),
            query_embeddings=embeddings,
            # Official: coordinates start at the box that entered the last layer, not at the one that left it.
            reference_points=boxes[:, -2, :, :2],
            input_sizes=trunk.input_sizes,
            proposal_indices=trunk.proposal_indices,
            last_hidden_state=queries,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=trunk.encoder_hidden_states,
            decoder_hidden_states=trunk.decoder_hidden_states,
            encoder_attentions=trunk.encoder_attentions,
            decoder_attentions=trunk.decoder_attentions,
            cross_attentions=trunk.cross_attentions,
        )
        if output_masks:
            outputs["pred_masks"] = self.decode_masks(outputs)
        return outputs


__all__ = [
    "UninextForUniversalPerception",
    "UninextImageFeatures",
    "UninextModel",
    "UninextOutput",
    "UninextPreTrainedModel",
    "UninextPromptFeatures",
]
