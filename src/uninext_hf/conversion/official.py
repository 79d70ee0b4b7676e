"""Read an official UNINEXT checkpoint, check every key, build our model from it; and the way back.

Nothing in a file is trusted: it is read with `weights_only=True`, its sizes are found from its tensors, and every
tensor must either be mapped or be on the list of dropped ones. A file that does not fit is refused in one sentence.
"""

import copy
import math
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from ..configuration_uninext import PRESETS, UninextConfig
from ..modeling_uninext import UninextForUniversalPerception
from .key_map import (
    IMAGE_BACKBONE,
    NEW_IN_STAGE_3,
    TEMPLATE_BACKBONE,
    Entry,
    Reshape,
    drop_reason,
    entries,
    second_names,
)

logger = logging.get_logger(__name__)

STEMS = {
    "resnet": "stem.conv1.weight",
    "convnext": "downsample_layers.0.0.weight",
    "vitdet": "patch_embed.proj.weight",
}
RESIZER = "detr.detr.transformer.resizer."


class ConversionError(ValueError):
    """The file is not an official UNINEXT checkpoint that we can read; the message is one sentence."""


@dataclass
class ConversionReport:
    """What became of every key.

    Attributes:
        stage: "image model (stage 1 or 2)" or "video model (stage 3)".
        backbone: model type of the backbone.
        template_channels: channels of the file's template branch, 0 if it has none.
        mapped: (official key, our keys, how, official shape).
        dropped: (official key, reason).
        fresh: our keys that the file cannot hold and that were initialised instead.
        missing: official keys that the file should hold and does not.
        unknown: keys of the file that no entry names.
        wrong: (official key, what is wrong with it).
    """

    stage: str
    backbone: str
    template_channels: int
    mapped: list[tuple[str, tuple[str, ...], str, tuple[int, ...]]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every source key is accounted for and every target filled."""
        return not (self.missing or self.unknown or self.wrong)

    def problem(self) -> str:
        """The first things that do not fit, as one sentence."""
        parts = []
        for name, keys in (
            ("missing", self.missing),
            ("unknown", self.unknown),
            ("unusable", [f"{key} ({why})" for key, why in self.wrong]),
        ):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                parts.append(f"{len(keys)} {name}: {', '.join(keys[:3])}{more}")
        return f"The checkpoint does not fit a {self.stage} with a {self.backbone} backbone; {'; '.join(parts)}."

    def lines(self) -> list[str]:
        """The whole report, a line per key."""
        rows = [
            f"stage     {self.stage}",
            f"backbone  {self.backbone}",
            f"template  {self.template_channels} channels" if self.template_channels else "template  none",
        ]
        rows += [
            f"mapped    {official} {list(shape)} -> {', '.join(ours)}{'' if how == 'same' else f' ({how})'}"
            for official, ours, how, shape in self.mapped
        ]
        rows += [f"dropped   {key}: {reason}" for key, reason in self.dropped]
        rows += [f"fresh     {key}: not in the file, initialised" for key in self.fresh]
        rows += [f"missing   {key}" for key in self.missing]
        rows += [f"unknown   {key}" for key in self.unknown]
        rows += [f"unusable  {key}: {why}" for key, why in self.wrong]
        rows.append(
            f"{len(self.mapped)} mapped, {len(self.dropped)} dropped, {len(self.fresh)} fresh, "
            f"{len(self.missing)} missing, {len(self.unknown)} unknown, {len(self.wrong)} unusable"
        )
        return rows


# Reading


def read_checkpoint(source: str | os.PathLike | Mapping) -> dict[str, Tensor]:
    """Tensors of an official checkpoint by their official names.

    Args:
        source: path of a `.pth` (`{"model": {...}}` or the bare dict) or `.safetensors` file, or such a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file cannot be read, or holds something else.
    """
    if isinstance(source, Mapping):
        where, content = "The given dict", source
    else:
        path = Path(source)
        where = f"{path.name!r}"
        if not path.is_file():
            raise FileNotFoundError(f'"path_or_state_dict" must be an existing file, got {str(source)!r}.')
        content = _read_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(
            f"{where} must hold a dict of tensors, alone or under the key 'model', got {_describe(content)}."
        )
    strange = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ConversionError(
            f"{where} must hold tensors by name only, got {_describe(content[strange[0]])} under {strange[0]!r}."
        )
    return dict(content)


def _read_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped from disk: a tensor that is dropped is never read. Only zip archives can be mapped.
        with path.open("rb") as file:
            mappable = file.read(2) == b"PK"
        if mappable:
            with zipfile.ZipFile(path) as archive:  # torch reads tensors without looking at their checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable or None)
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
    ) as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # unpickling may raise anything, and its own error type is private to torch
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConversionError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConversionError(
        f"{path.name!r} ({path.stat().st_size} bytes) cannot be read as a checkpoint; it is cut off, damaged, of "
        f"another kind, or holds more than tensors ({reason[:160]})."
    )


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict with keys {list(value)[:3]}" if value else "an empty dict"
    return f"a {type(value).__name__}"


# Sizes


class _Shapes:
    """Sizes of an official checkpoint, found from its tensors."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def of(self, key: str) -> tuple[int, ...]:
        if key not in self.state:
            hint = ""
            if any(name.startswith(("model.image_encoder.", "image_encoder.")) for name in self.state):
                hint = "; it is already converted, load it with from_pretrained"
            raise ConversionError(
                f"This is no official UNINEXT checkpoint: {key!r} is not among its {len(self.state)} keys "
                f"(the first are {', '.join(list(self.state)[:3])}){hint}."
            )
        return tuple(self.state[key].shape)

    def axis(self, key: str, axis: int) -> int:
        shape = self.of(key)
        if axis >= len(shape):
            raise ConversionError(f"{key!r} must have at least {axis + 1} axes, got shape {list(shape)}.")
        return shape[axis]

    def count(self, prefix: str) -> int:
        """Number of consecutive list entries `prefix0`, `prefix1`, ..."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        found = {int(match[1]) for match in map(pattern.match, self.state) if match}
        return next(number for number in range(len(found) + 1) if number not in found)


def infer_config(state: Mapping[str, Tensor]) -> UninextConfig:
    """Configuration of an official checkpoint.

    What tensors cannot show is taken from the released models: 8 attention heads and 64-wide text heads, drop rates,
    and the frozen stages of image models with a ResNet.

    Raises:
        ConversionError: the tensors are not those of an official checkpoint.
    """
    shapes, transformer = _Shapes(state), "detr.detr.transformer"
    levels, width = shapes.axis(f"{transformer}.level_embed", 0), shapes.axis(f"{transformer}.level_embed", 1)
    heads = UninextConfig.encoder_attention_heads
    encoder, decoder = f"{transformer}.encoder.layers.", f"{transformer}.decoder.layers."
    video = any(key.startswith(TEMPLATE_BACKBONE[0]) for key in state)
    backbone = _infer_backbone(shapes, IMAGE_BACKBONE[0])
    text = "text_encoder.body.model."
    text_width = shapes.axis(f"{text}embeddings.word_embeddings.weight", 1)
    reid_layers = shapes.count("detr.reid_embed_head.0.layers.")
    fields = {
        "backbone_config": backbone,
        "text_config": {
            "model_type": "bert",
            "vocab_size": shapes.axis(f"{text}embeddings.word_embeddings.weight", 0),
            "hidden_size": text_width,
            "num_hidden_layers": shapes.count(f"{text}encoder.layer."),
            "num_attention_heads": max(1, text_width // 64),
            "intermediate_size": shapes.axis(f"{text}encoder.layer.0.intermediate.dense.weight", 0),
            "max_position_embeddings": shapes.axis(f"{text}embeddings.position_embeddings.weight", 0),
            "type_vocab_size": shapes.axis(f"{text}embeddings.token_type_embeddings.weight", 0),
        },
        "d_model": width,
        "num_feature_levels": levels,
        "num_queries": shapes.axis(f"{transformer}.tgt_embed.weight", 0),
        "encoder_layers": shapes.count(encoder),
        "encoder_ffn_dim": shapes.axis(f"{encoder}0.linear1.weight", 0),
        "encoder_n_points": shapes.axis(f"{encoder}0.self_attn.attention_weights.weight", 0) // (heads * levels),
        "decoder_layers": shapes.count(decoder),
        "decoder_ffn_dim": shapes.axis(f"{decoder}0.linear1.weight", 0),
        "decoder_n_points": shapes.axis(f"{decoder}0.cross_attn.attention_weights.weight", 0) // (heads * levels),
        "fusion_dim": shapes.axis(f"{transformer}.encoder.vl_layers.0.b_attn.attn.v_proj.weight", 0),
        "mask_feature_dim": shapes.axis("detr.mask_head.lay2.weight", 0),
        "use_template_encoder": video,
        # A stage-2 to stage-3 file has no head yet; the released video models have two layers.
        "num_reid_layers": reid_layers or (UninextConfig.num_reid_layers if video else 0),
        "frozen_stages": 2 if backbone["model_type"] == "resnet" and not video else 0,
    }
    try:
        return UninextConfig(**fields)
    except (ValueError, StrictDataclassError) as error:
        # The library wraps our sentence in lines of its own.
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConversionError(f"The sizes of this checkpoint fit no UNINEXT model: {reason}") from error


def _infer_backbone(shapes: _Shapes, prefix: str) -> dict:
    kinds = [kind for kind, stem in STEMS.items() if prefix + stem in shapes.state]
    if len(kinds) != 1:
        found = " and ".join(kinds) if kinds else "none of them"
        raise ConversionError(
            f"The picture backbone must be a ResNet, a ConvNeXt or a plain vision transformer under {prefix!r}, "
            f"found {found}."
        )
    return {"resnet": _infer_resnet, "convnext": _infer_convnext, "vitdet": _infer_vit}[kinds[0]](shapes, prefix)


def _infer_resnet(shapes: _Shapes, prefix: str) -> dict:
    return {
        "model_type": "resnet",
        "embedding_size": shapes.axis(f"{prefix}stem.conv1.weight", 0),
        "hidden_sizes": [shapes.axis(f"{prefix}res{stage}.0.shortcut.weight", 0) for stage in range(2, 6)],
        "depths": [shapes.count(f"{prefix}res{stage}.") for stage in range(2, 6)],
        "out_indices": [2, 3, 4],
    }


def _infer_convnext(shapes: _Shapes, prefix: str) -> dict:
    stages = range(shapes.count(f"{prefix}stages."))
    return {
        **copy.deepcopy(PRESETS["convnext-large"]["backbone_config"]),
        "depths": [shapes.count(f"{prefix}stages.{stage}.") for stage in stages],
        "hidden_sizes": [shapes.axis(f"{prefix}stages.{stage}.0.dwconv.weight", 0) for stage in stages],
    }


def _infer_vit(shapes: _Shapes, prefix: str) -> dict:
    layers = shapes.count(f"{prefix}blocks.")
    width = shapes.axis(f"{prefix}pos_embed", 2)
    patch = shapes.axis(f"{prefix}patch_embed.proj.weight", 2)
    grid = math.isqrt(shapes.axis(f"{prefix}pos_embed", 1) - 1)
    tables = [shapes.axis(f"{prefix}blocks.{layer}.attn.rel_pos_h", 0) for layer in range(layers)]
    if not tables:
        raise ConversionError(f"The vision transformer under {prefix!r} has no blocks.")
    # Tables have 2 n - 1 rows: n is the window where a block has one, else the side of the training grid.
    window, full = (min(tables) + 1) // 2, (max(tables) + 1) // 2
    return {
        **copy.deepcopy(PRESETS["vit-huge"]["backbone_config"]),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // shapes.axis(f"{prefix}blocks.0.attn.rel_pos_h", 1)),
        "image_size": full * patch,
        "pretrain_image_size": grid * patch,
        "patch_size": patch,
        "window_size": window,
        "window_block_indices": [layer for layer, rows in enumerate(tables) if rows == min(tables) < max(tables)],
        "out_indices": [layers],
    }


# Mapping


def _expected_shapes(config: UninextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = UninextForUniversalPerception(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _to_ours(entry: Entry, tensor: Tensor) -> tuple[Tensor, ...]:
    if entry.reshape is Reshape.SQUEEZE:
        return (tensor.squeeze(0),)
    if entry.reshape is Reshape.SPLIT:
        return tensor.chunk(3)
    return (tensor,)


def _official_shape(entry: Entry, expected: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = expected[entry.ours[0]]
    if entry.reshape is Reshape.SQUEEZE:
        return (1, *shape)
    if entry.reshape is Reshape.SPLIT:
        return (3 * shape[0], *shape[1:])
    return shape


def _template_stem(config: UninextConfig) -> str:
    return TEMPLATE_BACKBONE[0] + STEMS[config.backbone_config.model_type]


def _convert(state: dict[str, Tensor], config: UninextConfig) -> tuple[dict[str, Tensor], ConversionReport]:
    video = any(key.startswith(TEMPLATE_BACKBONE[0]) for key in state)
    stem = state.get(_template_stem(config))
    report = ConversionReport(
        stage="video model (stage 3)" if video else "image model (stage 1 or 2)",
        backbone=config.backbone_config.model_type,
        template_channels=stem.shape[1] if stem is not None and stem.dim() == 4 else 0,
    )
    if report.template_channels == 3:
        # The picture backbone's own stem, copied: the target channel starts at zero, as in the official script
        # (conversion/convert_3c_to_4c_pth.py).
        state = {**state, _template_stem(config): _with_zero_channel(stem)}
    expected, ours, known = _expected_shapes(config), {}, set()
    partial = video and not any(key.startswith(NEW_IN_STAGE_3) for key in state)
    for entry in entries(config):
        known.add(entry.official)
        tensor = state.get(entry.official)
        if tensor is None:
            if partial and entry.official.startswith(NEW_IN_STAGE_3):
                report.fresh.extend(entry.ours)
            else:
                report.missing.append(entry.official)
            continue
        shape = _official_shape(entry, expected)
        if tuple(tensor.shape) != shape:
            report.wrong.append((entry.official, f"shape {list(tensor.shape)}, expected {list(shape)}"))
        elif not tensor.is_floating_point():
            report.wrong.append((entry.official, f"dtype {tensor.dtype}, expected a floating-point type"))
        elif tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            report.wrong.append((entry.official, "not-a-number or infinite values"))
        else:
            ours.update(zip(entry.ours, _to_ours(entry, tensor), strict=True))
            report.mapped.append((entry.official, entry.ours, entry.reshape.value, tuple(tensor.shape)))
            report.wrong.extend(_compare_second_name(state, entry.official, tensor))
    for key in state:
        if key not in known:
            reason = drop_reason(key)
            if reason is None:
                report.unknown.append(key)
            else:
                report.dropped.append((key, reason))
    return ours, report


def _compare_second_name(state: dict[str, Tensor], key: str, tensor: Tensor) -> list[tuple[str, str]]:
    name = second_names(key)
    other = state.get(name) if name else None
    if other is None or tensor.device.type == "meta":
        return []
    return [] if torch.equal(tensor, other) else [(name, f"differs from {key}, of which it is a second name")]


def _with_zero_channel(weight: Tensor) -> Tensor:
    return torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1)


def verify_official(
    path_or_state_dict: str | os.PathLike | Mapping, config: UninextConfig | None = None, as_video: bool = False
) -> ConversionReport:
    """Check an official checkpoint key by key without building the model; see `load_official` for the arguments."""
    state = _prepared(read_checkpoint(path_or_state_dict), as_video)
    return _convert(state, infer_config(state) if config is None else config)[1]


def load_official(
    path_or_state_dict: str | os.PathLike | Mapping, config: UninextConfig | None = None, as_video: bool = False
) -> UninextForUniversalPerception:
    """Build our model from an official checkpoint.

    Backbone, stage and channels of the template branch are found from the file. A template branch with 3 channels, or
    one without its fuser, projection and re-identification head (what the official stage-2 to stage-3 script writes),
    is completed: the target channel with zeros, the new layers by their initialisation.

    Args:
        path_or_state_dict: `.pth` or `.safetensors` file, or the dict itself.
        config: sizes that tensors cannot show (attention heads, ...); inferred when `None`.
        as_video: turn an image model (stage 2) into the start of a video model (stage 3): the template backbone
            becomes a copy of the picture backbone with a zero target channel, the new layers start fresh.

    Returns:
        The model in evaluation mode; its tensors are the file's, assigned, not copied, in the file's dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file does not fit; the sentence names the first keys.
    """
    state = _prepared(read_checkpoint(path_or_state_dict), as_video)
    if config is None:
        config = infer_config(state)
    ours, report = _convert(state, config)
    if not report.ok:
        raise ConversionError(report.problem())
    if report.fresh:
        logger.warning(f"{len(report.fresh)} new tensors of the video model start fresh: {report.fresh[0]}, ...")
    return _build(config, ours, set(report.fresh))


def _prepared(state: dict[str, Tensor], as_video: bool) -> dict[str, Tensor]:
    has_template = any(key.startswith(TEMPLATE_BACKBONE[0]) for key in state)
    return _image_to_video(state) if as_video and not has_template else state


def _image_to_video(state: dict[str, Tensor]) -> dict[str, Tensor]:
    source, target = IMAGE_BACKBONE[0], TEMPLATE_BACKBONE[0]
    # Copies, not second names: both backbones are trained, and a saved file must not take them for tied.
    copies = {target + key[len(source) :]: tensor.clone() for key, tensor in state.items() if key.startswith(source)}
    return {**state, **copies}


def _build(config: UninextConfig, ours: dict[str, Tensor], fresh: set[str]) -> UninextForUniversalPerception:
    if any(tensor.device.type == "meta" for tensor in ours.values()):
        with torch.device("meta"):
            model = UninextForUniversalPerception(config)
        model.load_state_dict(ours, assign=True, strict=not fresh)
        return model.eval()
    verbosity = logging.get_verbosity()
    if fresh:
        # The library prints a table of missing tensors; ours are expected and already reported.
        logging.set_verbosity_error()
    try:
        model, info = UninextForUniversalPerception.from_pretrained(
            None, config=config, state_dict=ours, output_loading_info=True, dtype=next(iter(ours.values())).dtype
        )
    finally:
        logging.set_verbosity(verbosity)
    problems = {name: sorted(set(keys) - fresh) for name, keys in info.items() if set(keys) - fresh}
    if problems:
        raise ConversionError(f"The model could not be filled: {problems}.")
    model.config._name_or_path = ""  # the library notes the path it was given, which was none
    return model.eval()


def to_official(model: UninextForUniversalPerception) -> dict[str, Tensor]:
    """Our weights under their official names, ready for `torch.save({"model": ...})`; the inverse of `load_official`.

    Keys that we drop come back as `key_map.DROPPED` documents: second names share their tensor, the unused resizer is
    a layer that outputs zero, the BoxInst counter is 0.

    Raises:
        ValueError: the backbone or text encoder is not one of the official ones.
    """
    ours, official = model.state_dict(), {}
    for entry in entries(model.config):
        tensors = [ours[key] for key in entry.ours]
        if entry.reshape is Reshape.SPLIT:
            tensor = torch.cat(tensors)
        else:
            tensor = tensors[0].unsqueeze(0) if entry.reshape is Reshape.SQUEEZE else tensors[0]
        official[entry.official] = tensor
        name = second_names(entry.official)
        if name:
            official[name] = tensor
    width, text = model.config.d_model, model.config.text_config.hidden_size
    like = official["detr.detr.transformer.level_embed"]
    official[f"{RESIZER}fc.weight"] = like.new_zeros((width, text))
    official[f"{RESIZER}fc.bias"] = like.new_zeros(width)
    official[f"{RESIZER}layer_norm.weight"] = like.new_ones(width)
    official[f"{RESIZER}layer_norm.bias"] = like.new_zeros(width)
    official["criterion._iter"] = like.new_zeros(1, dtype=torch.float32)
    return official
