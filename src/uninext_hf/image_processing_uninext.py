"""Pictures in, network input out: load, resize, normalise, pad, crop templates; and raw boxes back to pixels.

Sources: resize rule and padding, detectron2 `ResizeShortestEdge` and `models/ddetrs_dn.py` 345-348; template
crop, `models/ddetrs_vid_dn.py` 95-139; selection of results, `uninext_img.py` 367-485.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .box_ops_uninext import box_cxcywh_to_xyxy, class_aware_nms, clip_boxes, masks_to_boxes, scale_boxes
from .prompt_uninext import Picture, Prompt

_SIXTEEN_BIT = 65535
_FARTHEST_BOX = 1e6  # pixels; far above any picture, far below where whole numbers stop being exact in float32


# Pictures


def load_picture(image: Picture | os.PathLike, name: str = "image", input_data_format: str | None = None) -> Tensor:
    """Any picture as 8-bit RGB.

    Transparency is laid over white, as transformers does. An EXIF orientation is applied, so boxes and masks refer to
    the picture as displayed. Of an animated file the first frame is taken (of an opened PIL picture, the frame it
    stands at). 16-bit values are scaled to 8 bits. Floating-point pictures are refused, since their range is a guess.

    Args:
        image: PIL in any mode except F; numpy (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16 (channels
            first is taken too where the shape leaves no doubt); torch (H, W) or (1, 3 or 4, H, W) of the same types;
            a path; an http(s) or data URL (whose transparency transformers drops).
        name: how error messages call the argument.
        input_data_format: "channels_first" or "channels_last" of an array or tensor; `None` to go by its shape.

    Returns:
        (3, H, W) uint8, on the device of a tensor, otherwise on the CPU. Never a view of the input.

    Raises:
        ValueError: another kind, type or shape; a file that is missing, damaged or cut off.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(os.fspath(image), name)
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, np.ndarray | Tensor):
        return _from_array(image, name, input_data_format)
    raise ValueError(
        f'"{name}" must be a PIL image, a uint8 numpy array (H, W, 3), a uint8 torch tensor (3, H, W), a path or a '
        f"URL, got {type(image).__name__}."
    )


def _from_file(path: str, name: str) -> Tensor:
    if path.startswith(("http://", "https://", "data:image/")):
        try:
            return _from_pil(load_image(path), name)
        except Exception as error:  # whatever the transport raises: no connection, bad certificate, not a picture
            raise ValueError(f'"{name}" could not be loaded from {path[:200]}: {error}') from error
    if not os.path.isfile(path):
        raise ValueError(f'"{name}" must be a path to an existing file or an http(s) URL, got {path!r}.')
    try:
        with Image.open(path) as picture:
            return _from_pil(picture, name)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f'"{name}" is not a complete picture file: {path!r} ({error}).') from error


def _from_pil(image: Image.Image, name: str) -> Tensor:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point values (mode F) have no known range, convert them to 8 bits first")
        if image.mode.startswith("I"):
            return _from_array(np.asarray(image).clip(0, _SIXTEEN_BIT).astype(np.uint16), name)
        has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f'"{name}" is not a complete picture: {error}.') from error
    except ValueError as error:
        raise ValueError(f'"{name}" must be a picture that Pillow can convert to RGB: {error}.') from error
    return _from_array(np.array(image), name)


def _from_array(image: np.ndarray | Tensor, name: str, input_data_format: str | None = None) -> Tensor:
    is_tensor = isinstance(image, Tensor)
    shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    expected = "torch tensor (3, H, W)" if is_tensor else "numpy array (H, W, 3)"
    if dtype not in ("uint8", "uint16"):
        raise ValueError(f'"{name}" must be uint8 if given as a {expected}, got shape {shape}, {dtype}.')
    pixels = image.detach() if is_tensor else torch.from_numpy(np.array(image))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3:
        is_last = not is_tensor and (shape[-1] <= 4 or shape[0] not in (1, 3, 4))
        if input_data_format is not None:
            is_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        pixels = pixels.movedim(-1, 0) if is_last else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4) or 0 in shape:
        raise ValueError(f'"{name}" must have 1, 3 or 4 channels if given as a {expected}, got shape {shape}.')
    if dtype == "uint16":
        pixels = (pixels.to(torch.int32) * 255 + _SIXTEEN_BIT // 2) // _SIXTEEN_BIT
    if pixels.shape[0] == 4:
        colors, alpha = pixels[:3].to(torch.int32), pixels[3:].to(torch.int32)
        pixels = (colors * alpha + 255 * (255 - alpha) + 127) // 255
    return pixels.expand(3, -1, -1).to(torch.uint8).clone(memory_format=torch.contiguous_format)


def load_pictures(
    images: Picture | os.PathLike | Sequence[Picture | os.PathLike] | Tensor, input_data_format: str | None = None
) -> list[Tensor]:
    """One picture or several as 8-bit RGB.

    Args:
        images: one picture (see `load_picture`), a list of them, or an array or tensor (B, ...) of equal ones.
        input_data_format: see `load_picture`.

    Returns:
        One tensor (3, H, W) uint8 for each.

    Raises:
        ValueError: there is none, or one cannot be used; the message says which one.
    """
    return [load_picture(picture, name, input_data_format) for name, picture in _named_pictures(images)]


def _named_pictures(images: object) -> list[tuple[str, Picture]]:
    """Pictures with the names that error messages use: "images" or "images[0]", "images[1]", ..."""
    if not isinstance(images, list | tuple) and getattr(images, "ndim", 3) != 4:
        return [("images", images)]
    if len(images) == 0:
        raise ValueError('"images" must hold at least one picture, got none.')
    return [(f"images[{index}]", picture) for index, picture in enumerate(images)]


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int | None = None) -> tuple[int, int]:
    """Size of the network input for a picture.

    The shorter side becomes `shortest_edge`, unless the longer one would exceed `longest_edge`; then that one is met.
    Sides are rounded half up and are at least one pixel.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        shortest_edge: wanted length of the shorter side, pixels.
        longest_edge: limit of the longer side, pixels; `None` for no limit.

    Returns:
        (height, width) in pixels.

    Source: detectron2, `ResizeShortestEdge`, whose order of operations decides about the last pixel.
    """
    scale = float(shortest_edge) / min(height, width)
    if height < width:
        new_height, new_width = float(shortest_edge), scale * width
    else:
        new_height, new_width = scale * height, float(shortest_edge)
    if longest_edge and max(new_height, new_width) > longest_edge:
        scale = float(longest_edge) / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


# Templates


def crop_template(
    pixels: Tensor,
    pixel_mask: Tensor | None,
    box: Sequence[float],
    target_mask: Tensor | None = None,
    template_size: int = 256,
    area_factor: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Square crop around a target, with the target drawn into a fourth channel.

    The crop has `ceil(area_factor * sqrt(w * h))` pixels a side and is resized bilinearly. What lies outside the
    picture is 0. Only the pixels that the result needs are read, so a box that reaches far over the border is no
    more expensive than another.

    Args:
        pixels: (3, H, W) normalised, padded picture.
        pixel_mask: (H, W), non-zero for real pixels; `None` when nothing is padded.
        box: x, y, w, h in pixels of `pixels`, with an area; may reach over the border.
        target_mask: (H, W) float in [0, 1], the target; `None` for a rectangle over the rounded box.
        template_size: side S of the result, pixels.
        area_factor: side of the crop relative to the square root of the box area.

    Returns:
        (4, S, S) float32: normalised colours and the target, not binarised; and (S, S) bool, False for every pixel
        that any padding or outside has entered.

    Source: official `models/ddetrs_vid_dn.py` 95-139.
    """
    x, y, w, h = (float(value) for value in box)
    side = max(math.ceil(math.sqrt(w * h) * area_factor), 1)
    left, top = round(x + 0.5 * w - 0.5 * side), round(y + 0.5 * h - 0.5 * side)
    # Half-pixel centres, as resizing the crop would use them.
    position = torch.arange(template_size, device=pixels.device, dtype=torch.float32) + 0.5
    position = (position * (side / template_size) - 0.5).clamp(min=0)
    low = position.long().clamp(max=side - 1)
    high, weight = (low + 1).clamp(max=side - 1), position - low

    padding = torch.zeros_like(pixels[0]) if pixel_mask is None else 1 - pixel_mask.to(pixels.dtype)
    target = torch.zeros_like(pixels[0]) if target_mask is None else target_mask.to(pixels.dtype)
    planes = torch.cat([pixels, target[None], padding[None]]).float()
    outside = planes.new_tensor((0.0, 0.0, 0.0, 0.0, 1.0))[:, None, None]

    def sample_rows(planes: Tensor, start: int) -> Tensor:
        # Official: a crop that reaches the right or bottom border is padded one pixel early, so the last column and
        # row are never used (ddetrs_vid_dn.py:95-139). We keep the only one of a picture one pixel wide.
        usable = max(planes.shape[1] - 1, 1)
        taps = []
        for index in (low + start, high + start):
            values = planes[:, index.clamp(0, usable - 1)]
            taps.append(torch.where(((index >= 0) & (index < usable))[:, None], values, outside))
        return torch.lerp(*taps, weight[:, None])

    crop = sample_rows(sample_rows(planes, top).mT, left).mT
    if target_mask is None:
        # The rectangle is drawn in the crop and not in the picture, so it goes on beyond the picture's border.
        across, down = (
            _sampled_interval(round(corner), max(round(length), 1), low, high, weight)
            for corner, length in ((x - left, w), (y - top, h))
        )
        crop[3] = down[:, None] * across
    return crop[:4].contiguous(), crop[4] == 0


def _sampled_interval(start: int, length: int, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    """Linear samples of a row that is 1 in [start, start + length) and 0 elsewhere."""
    taps = [((index >= start) & (index < start + length)).float() for index in (low, high)]
    return torch.lerp(*taps, weight)


# The image processor


class UninextImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments beyond those of every image processor.

    Args:
        size_divisor (`int`, *optional*): height and width of the padded batch become multiples of this; `None` for no
            padding beyond the largest picture.
        template_size (`int`): side of template crops, pixels.
        template_area_factor (`float`): side of template crops relative to the square root of the box area.
    """

    size_divisor: int | None
    template_size: int
    template_area_factor: float


class UninextImageProcessor(TorchvisionBackend):
    """Pictures of any size and kind -> one padded batch and its mask; reference pictures -> template crops.

    The shorter side becomes 800 pixels unless the longer one would exceed 1333. Colours are RGB, normalised with the
    ImageNet statistics. Padding is at the right and bottom, 0 after normalisation. `size_divisor` is None for ResNet
    (the released models run un-padded at inference) and 32 for ConvNeXt and ViT, see `UninextProcessor.for_model`.
    Accepted pictures: see `load_picture`.
    """

    valid_kwargs = UninextImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 800, "longest_edge": 1333}
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    size_divisor = None
    template_size = 256
    template_area_factor = 2.0

    def __init__(self, **kwargs: Unpack[UninextImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _standardize_kwargs(self, size: int | Mapping[str, int] | SizeDict | None = None, **kwargs) -> dict:
        if isinstance(size, int):  # a single number is the shorter side; the limit of the longer one stays
            size = {"shortest_edge": size, "longest_edge": type(self).size["longest_edge"]}
        return super()._standardize_kwargs(size=size, **kwargs)

    def process_image(
        self,
        image: Picture,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        name: str = "images",
        **kwargs,
    ) -> Tensor:
        """One picture as (3, H, W) uint8, see `load_picture`; `do_convert_rgb=False` leaves it to transformers."""
        if not do_convert_rgb:
            return super().process_image(image, False, input_data_format, device, **kwargs)
        picture = load_picture(image, name, input_data_format)
        return picture if device is None else picture.to(device)

    def _prepare_image_like_inputs(self, images, *args, expected_ndims: int = 3, **kwargs) -> list[Tensor]:
        return [self.process_image(picture, name=name, **kwargs) for name, picture in _named_pictures(images)]

    def resize(
        self,
        image: Tensor,
        size: SizeDict,
        resample: PILImageResampling | int | None = None,
        antialias: bool = True,
        **kwargs,
    ) -> Tensor:
        """Resize (..., H, W) pictures; `shortest_edge` and `longest_edge` by the official rule (`resized_size`)."""
        if size.shortest_edge:
            height, width = resized_size(*image.shape[-2:], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, resample=resample, antialias=antialias, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        do_pad: bool,
        pad_size: SizeDict | None = None,
        size_divisor: int | None = None,
        do_center_crop: bool | None = None,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        if do_center_crop:
            raise ValueError('"do_center_crop" must be left out: boxes refer to the whole picture. Crop it before.')
        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, batch in groups.items():
            if do_resize:
                batch = self.resize(batch, size, resample)
            groups[shape] = self.rescale_and_normalize(
                batch, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        images = reorder_images(groups, order)
        if do_pad:
            images, masks = self.pad(images, _padded_size(images, pad_size, size_divisor), return_mask=True)
        else:
            masks = [torch.ones_like(image[0], dtype=torch.int64) for image in images]
        return BatchFeature({"pixel_values": images, "pixel_mask": masks}, tensor_type=return_tensors)

    def prepare_template(
        self,
        image: Picture,
        box: Sequence[float] | None = None,
        mask: np.ndarray | Tensor | Image.Image | None = None,
        **kwargs: Unpack[UninextImageProcessorKwargs],
    ) -> dict[str, Tensor]:
        """The crop that tells the model which object is meant.

        The picture is resized, normalised and padded as any other, then cropped around the target (`crop_template`).

        Args:
            image: the reference picture.
            box: x0, y0, x1, y1 in pixels of `image` as displayed; may reach over the border.
            mask: (H, W) in the size of `image`, non-zero = target. Exactly one of `box` and `mask` must be given; the
                box of a mask is the smallest one around it.
            kwargs: as for pictures (`do_resize`, `size`, `template_size`, ...).

        Returns:
            "template_values" (4, S, S) float32, normalised RGB and the target; "template_mask" (S, S) bool, False
            where the crop leaves the picture.

        Raises:
            ValueError: the picture cannot be loaded, see `load_picture`; box or mask do not fit it, see `Prompt`; or
                nothing of the picture is left in the crop.
        """
        size = kwargs.pop("template_size", None) or self.template_size
        factor = kwargs.pop("template_area_factor", None) or self.template_area_factor
        picture = load_picture(image, input_data_format=kwargs.pop("input_data_format", None))
        prompt = Prompt.template(picture, box, mask)
        inputs = self.preprocess([picture], **{**kwargs, "pad_size": None, "return_tensors": "pt"})
        pixels, pixel_mask = inputs["pixel_values"][0], inputs["pixel_mask"][0]
        resized = (int(pixel_mask[:, 0].sum()), int(pixel_mask[0].sum()))
        target, corners = None, prompt.box
        if prompt.mask is not None:
            target = pixels.new_zeros(pixels.shape[-2:])
            target[: resized[0], : resized[1]] = _resize_mask(prompt.mask.to(pixels.device), resized)
            # The target may vanish from a very small picture; its box never does.
            corners = masks_to_boxes(prompt.mask).tolist()
        x0, y0, x1, y1 = scale_boxes(torch.tensor(corners, dtype=torch.float64), picture.shape[-2:], resized).tolist()
        if max(map(abs, (x0, y0, x1, y1))) > _FARTHEST_BOX:
            raise ValueError(f'"box" must lie near the reference image, got {tuple(corners)}.')
        values, keep = crop_template(pixels, pixel_mask, (x0, y0, x1 - x0, y1 - y0), target, size, factor)
        if not F.interpolate(keep[None, None].float(), scale_factor=1 / 8).any():
            raise ValueError(
                f'"{"box" if mask is None else "mask"}" must leave some of the reference image in the crop around it, '
                f"got {tuple(corners)} in {picture.shape[-2]} x {picture.shape[-1]} pixels (height x width)."
            )
        return {"template_values": values, "template_mask": keep}

    def post_process_object_detection(
        self, outputs: Mapping[str, Tensor], threshold: float = 0.5, target_sizes: Sequence | Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Boxes of prompts that hold a single name each, between two special tokens.

        This is what transformers' zero-shot pipeline feeds and calls. For lists of names, expressions, references and
        masks use `UninextProcessor.post_process_instances`, which knows the prompts.

        Args:
            outputs: a `UninextOutput` or a mapping with its fields, P rows.
            threshold: rows below this score are left out, in [0, 1].
            target_sizes: P pairs (height, width) of the original pictures in pixels; `None` for network input pixels.

        Returns:
            P dictionaries: "scores" (N,), "labels" (N,) all 0, "boxes" (N, 4) as (x0, y0, x1, y1) in pixels.
        """
        fields = Predictions.from_outputs(outputs)
        rows, _, length = fields.logits.shape
        label_map = torch.zeros(1, length, dtype=torch.bool)
        label_map[:, 1 : max(length - 1, 2)] = True
        sizes = check_target_sizes(target_sizes, rows) or [None] * rows
        results = []
        for row, size in enumerate(sizes):
            found = select_instances([fields.row(row)], [label_map], [[0]], threshold=threshold)
            boxes, _ = boxes_to_pixels(found.boxes, fields.input_size(row), size)
            results.append({"scores": found.scores, "labels": found.labels, "boxes": boxes})
        return results


def _padded_size(images: list[Tensor], pad_size: SizeDict | None, divisor: int | None) -> SizeDict:
    """The size every picture of the batch gets: the largest one or the one asked for, rounded up to the divisor."""
    if pad_size:
        height, width = pad_size.height, pad_size.width
    else:
        height, width = (max(image.shape[dim] for image in images) for dim in (-2, -1))
    step = divisor or 1
    return SizeDict(height=math.ceil(height / step) * step, width=math.ceil(width / step) * step)


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) bool -> `size` float, nearest; a target too thin for that covers every pixel it touches."""
    resized = F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")
    if not resized.any():
        resized = (F.interpolate(mask[None, None].float(), size=size, mode="area") > 0).float()
    return resized[0, 0]


# From raw predictions to boxes. Each function is one step; `select_instances` is their order.


class RowPredictions(NamedTuple):
    """Raw predictions of one prompt row, float32.

    Args:
        logits: (Q, L) per token.
        ious: (Q,) logits of the box quality.
        boxes: (Q, 4) as (cx, cy, w, h) relative to the un-padded input.
    """

    logits: Tensor
    ious: Tensor
    boxes: Tensor


class Predictions(NamedTuple):
    """The fields of `UninextOutput` that results are made of, checked and in float32; P rows, see there."""

    logits: Tensor
    pred_ious: Tensor
    pred_boxes: Tensor
    input_sizes: Tensor

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, Tensor]) -> "Predictions":
        """Read and check the fields.

        Raises:
            ValueError: a field is missing or holds NaN or infinite values.
        """
        names = cls._fields
        return cls(*(finite_field(outputs, name) for name in names))

    def row(self, row: int) -> RowPredictions:
        """Predictions of one prompt row."""
        return RowPredictions(self.logits[row], self.pred_ious[row], self.pred_boxes[row])

    def input_size(self, row: int) -> tuple[int, int]:
        """Un-padded (height, width) of the network input of one prompt row, pixels."""
        height, width = self.input_sizes[row].tolist()
        return int(height), int(width)


class Selection(NamedTuple):
    """N (query, label) pairs, best score first.

    Args:
        queries: (N,) int64 into the queries of all rows, one row after the other.
        labels: (N,) int64 indices into the caller's list of names.
        scores: (N,) float32 in [0, 1].
        boxes: (N, 4) as (x0, y0, x1, y1) relative to the un-padded input.
    """

    queries: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor


def finite_field(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    """A field of the outputs in float32.

    Raises:
        ValueError: it is missing, or holds NaN or infinite values.
    """
    value = outputs.get(name)
    if value is None:
        raise ValueError(f'"outputs" must hold "{name}", got {", ".join(outputs) or "nothing"}.')
    value = value.detach().float()
    if not value.isfinite().all():
        raise ValueError(f'"outputs" must hold finite numbers, got NaN or infinite values in "{name}".')
    return value


def label_logits(logits: Tensor, label_map: Tensor) -> Tensor:
    """Mean of the token logits of each name.

    Args:
        logits: (Q, L) per token.
        label_map: (K, M) bool, which tokens belong to which name, at least one each; M <= L.

    Returns:
        (Q, K).
    """
    weights = label_map.to(logits.device, logits.dtype)
    return logits[:, : weights.shape[1]] @ (weights / weights.sum(1, keepdim=True)).T


def label_scores(logits: Tensor, ious: Tensor | None) -> Tensor:
    """Scores in [0, 1]: probability of the name, in geometric mean with the predicted box quality.

    Args:
        logits: (Q, K) per name.
        ious: (Q,) logits of the box quality, or `None` to go by the name alone.
    """
    scores = logits.sigmoid()
    return scores if ious is None else (scores * ious.sigmoid()[:, None]).sqrt()


def best_pairs(scores: Tensor, top_k: int | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best (query, name) pairs; a query may come several times with different names.

    Args:
        scores: (Q, K); negative where there is no such pair.
        top_k: how many at most; `None` for all.
        threshold: pairs with a lower score are left out; one that is equal stays.

    Returns:
        Queries (N,), columns (N,) and scores (N,), best first.
    """
    flat = scores.flatten()
    values, indices = flat.topk(flat.numel() if top_k is None else min(top_k, flat.numel()))
    indices, values = indices[values >= max(threshold, 0)], values[values >= max(threshold, 0)]
    return indices // scores.shape[1], indices % scores.shape[1], values


def select_instances(
    rows: Sequence[RowPredictions],
    label_maps: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    threshold: float = 0.0,
    top_k: int | None = 100,
    nms_iou: float | None = 0.7,
    use_iou_score: bool = True,
) -> Selection:
    """The results of one prompt on one picture, from the row of each chunk of the prompt.

    Args:
        rows: predictions of each chunk.
        label_maps: for each chunk, which of its tokens belong to which of its K names, (K, L) bool.
        labels: for each chunk, the K indices of its names in the caller's list.
        threshold: lowest score that is kept, in [0, 1].
        top_k: how many pairs are kept at most; `None` for all.
        nms_iou: of two queries whose best names are equal and whose boxes overlap by more than this IoU, only the
            better one is kept; `None` for no suppression.
        use_iou_score: whether the predicted box quality enters the score.

    Returns:
        The selected pairs.

    Source: official `uninext_img.py` 367-485. Chunks, which it does not have, are further queries here.
    """
    scores = [
        label_scores(label_logits(row.logits, label_map), row.ious if use_iou_score else None)
        for row, label_map in zip(rows, label_maps, strict=True)
    ]
    most = max(map(len, labels))
    columns = torch.stack([_filled(torch.tensor(chunk), most, 0) for chunk in labels]).to(scores[0].device)
    sizes = [len(chunk) for chunk in scores]
    columns = columns.repeat_interleave(torch.tensor(sizes, device=columns.device), dim=0)
    scores = torch.cat([_filled(chunk, most, -1.0) for chunk in scores])
    boxes = box_cxcywh_to_xyxy(torch.cat([row.boxes for row in rows]))
    kept = torch.arange(len(boxes), device=boxes.device)
    if nms_iou is not None:
        best, column = scores.max(dim=1)
        kept = class_aware_nms(boxes, best, columns.gather(1, column[:, None])[:, 0], nms_iou)
    queries, column, scores = best_pairs(scores[kept], top_k, threshold)
    queries = kept[queries]
    return Selection(queries, columns[queries, column], scores, boxes[queries])


def _filled(values: Tensor, length: int, filler: float) -> Tensor:
    """The last axis extended to `length`."""
    return F.pad(values, (0, length - values.shape[-1]), value=filler)


def boxes_to_pixels(
    boxes: Tensor, input_size: tuple[int, int], target_size: tuple[int, int] | None, clip: bool = True
) -> tuple[Tensor, Tensor]:
    """Relative boxes in pixels of the original picture.

    Args:
        boxes: (N, 4) as (x0, y0, x1, y1) relative to the un-padded input.
        input_size: un-padded (height, width) of the network input, pixels.
        target_size: (height, width) of the original picture, pixels; `None` for the network input.
        clip: cut boxes off at the border; otherwise they may reach over it.

    Returns:
        (N, 4) float32 in pixels, and (N,) bool: which boxes have an area (all, without `clip`).
    """
    boxes = scale_boxes(boxes, (1, 1), input_size)
    if target_size is not None:
        boxes = scale_boxes(boxes, input_size, target_size)
    if not clip:
        return boxes, torch.ones_like(boxes[:, 0], dtype=torch.bool)
    boxes = clip_boxes(boxes, target_size or input_size)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def check_target_sizes(target_sizes: Sequence | Tensor | None, count: int) -> list[tuple[int, int]] | None:
    """Picture sizes as pairs of integers.

    Args:
        target_sizes: `count` pairs (height, width), or one pair for all; list, array or tensor; or `None`.
        count: how many there must be.

    Returns:
        `count` pairs, or `None`.

    Raises:
        ValueError: another number of pairs, or something that is not a pair of positive integers.
    """
    if target_sizes is None:
        return None
    values = target_sizes.tolist() if hasattr(target_sizes, "tolist") else list(target_sizes)
    try:
        sizes = [(int(height), int(width)) for height, width in values]
    except (TypeError, ValueError):
        raise ValueError(f'"target_sizes" must be a list of pairs (height, width), got {values!r}.') from None
    if any(side < 1 for size in sizes for side in size):
        raise ValueError(f'"target_sizes" must hold positive numbers of pixels, got {values!r}.')
    if len(sizes) not in (1, count):
        raise ValueError(f'"target_sizes" must hold {count} pairs (height, width) or one for all, got {len(sizes)}.')
    return sizes * count if len(sizes) == 1 else sizes


__all__ = [
    "Predictions",
    "RowPredictions",
    "Selection",
    "UninextImageProcessor",
    "UninextImageProcessorKwargs",
    "best_pairs",
    "boxes_to_pixels",
    "check_target_sizes",
    "crop_template",
    "finite_field",
    "label_logits",
    "label_scores",
    "load_picture",
    "load_pictures",
    "resized_size",
    "select_instances",
]
