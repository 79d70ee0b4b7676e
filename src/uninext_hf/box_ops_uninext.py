"""Boxes and masks as plain tensors: convert, scale, clip, compare, suppress, run-length encode.

Sources: generalised IoU, https://arxiv.org/abs/1902.09630; run-length format, the C code of the COCO API
(https://github.com/cocodataset/cocoapi, common/maskApi.c), whose bytes the functions here reproduce.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

_MAX_GROUPS = 7  # of five bits: enough for the difference of two 32-bit run lengths


class Rle(TypedDict):
    """A run-length encoded mask in COCO's compressed form, ready for JSON."""

    size: list[int]
    """Height and width in pixels."""
    counts: str
    """Run lengths in column-major order, starting with background, as COCO's printable characters."""


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corner form of centre-form boxes.

    Args:
        boxes: (..., 4) as (cx, cy, w, h), any unit and frame; the result keeps them.

    Returns:
        (..., 4) as (x0, y0, x1, y1).
    """
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre form of corner-form boxes.

    Args:
        boxes: (..., 4) as (x0, y0, x1, y1), any unit and frame; the result keeps them.

    Returns:
        (..., 4) as (cx, cy, w, h).
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def box_xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corner form of COCO-form boxes.

    Args:
        boxes: (..., 4) as (x0, y0, w, h), any unit and frame; the result keeps them.

    Returns:
        (..., 4) as (x0, y0, x1, y1).
    """
    x0, y0, w, h = boxes.unbind(-1)
    return torch.stack((x0, y0, x0 + w, y0 + h), dim=-1)


def scale_boxes(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Boxes of a picture, moved to a resized copy of it.

    Args:
        boxes: (..., 4), corner or centre form, in pixels of the picture of `from_size`. For boxes relative to the
            picture, in [0, 1], pass `from_size=(1, 1)`.
        from_size: (height, width) that `boxes` refer to.
        to_size: (height, width) of the copy.

    Returns:
        (..., 4) in pixels of the copy, in the form that came in.
    """
    factor_y, factor_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return boxes * boxes.new_tensor((factor_x, factor_y, factor_x, factor_y), dtype=_float_type(boxes))


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes cut off at the border of the picture; a box outside becomes empty, on the border.

    Args:
        boxes: (..., 4) as (x0, y0, x1, y1) in pixels.
        size: (height, width) of the picture in pixels.

    Returns:
        (..., 4) in the same frame, a new tensor.
    """
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack((x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Areas of boxes.

    Args:
        boxes: (..., 4) as (x0, y0, x1, y1), any unit.

    Returns:
        (...) in that unit squared, in float32 or wider.
    """
    boxes = boxes.to(_float_type(boxes))
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou_aligned(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union, row by row.

    Args:
        boxes1: (..., 4) as (x0, y0, x1, y1), any unit and frame.
        boxes2: (..., 4) in the same unit and frame; leading dimensions broadcast against those of `boxes1`.

    Returns:
        (...) in [0, 1], in float32 or wider; 0 where neither box has an area.
    """
    intersection, union = _intersection_and_union(boxes1, boxes2)
    return _safe_ratio(intersection, union)


def generalized_box_iou_aligned(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised intersection over union, row by row.

    Args:
        boxes1: (..., 4) as (x0, y0, x1, y1), any unit and frame.
        boxes2: (..., 4) in the same unit and frame; leading dimensions broadcast against those of `boxes1`.

    Returns:
        (...) in [-1, 1], in float32 or wider; 0 where both boxes are the same point.

    Source: https://arxiv.org/abs/1902.09630, algorithm 1.
    """
    boxes1, boxes2 = boxes1.to(_float_type(boxes1)), boxes2.to(_float_type(boxes2))
    intersection, union = _intersection_and_union(boxes1, boxes2)
    hull = _product(torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2]))
    return _safe_ratio(intersection, union) - _safe_ratio(hull - union, hull)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair; as in torchvision, but 0 and not NaN where neither box has an area.

    Args:
        boxes1: (N, 4) as (x0, y0, x1, y1), any unit and frame.
        boxes2: (M, 4) in the same unit and frame.

    Returns:
        (N, M) in [0, 1], in float32 or wider.
    """
    return box_iou_aligned(boxes1[:, None], boxes2[None])


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised intersection over union of every pair; as in torchvision, but never NaN for boxes without area.

    Args:
        boxes1: (N, 4) as (x0, y0, x1, y1), any unit and frame.
        boxes2: (M, 4) in the same unit and frame.

    Returns:
        (N, M) in [-1, 1], in float32 or wider.
    """
    return generalized_box_iou_aligned(boxes1[:, None], boxes2[None])


def class_aware_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each label.

    Args:
        boxes: (N, 4) as (x0, y0, x1, y1), any unit and frame.
        scores: (N,), higher wins.
        labels: (N,) int64; boxes of different labels never suppress each other.
        threshold: a box goes when its IoU with a better box of its label is above this, in [0, 1].

    Returns:
        (K,) int64 indices of the rows that stay, best score first.
    """
    # torchvision has no half-precision suppression on the CPU.
    return batched_nms(boxes.to(_float_type(boxes)), scores.to(_float_type(scores)), labels, threshold)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight boxes around masks.

    Right and bottom are exclusive (last pixel + 1), so that a mask of one pixel gives a box of area 1.

    Args:
        masks: (..., H, W), non-zero = inside.

    Returns:
        (..., 4) float32 as (x0, y0, x1, y1) in pixels of the masks; zeros for an empty mask.
    """
    if masks.shape[-1] == 0 or masks.shape[-2] == 0:
        return masks.new_zeros((*masks.shape[:-2], 4), dtype=torch.float32)
    inside = masks if masks.dtype == torch.bool else masks != 0
    x0, x1 = _first_and_last(inside.any(dim=-2))
    y0, y1 = _first_and_last(inside.any(dim=-1))
    return torch.stack((x0, y0, x1, y1), dim=-1).to(torch.float32)


def mask_to_rle(mask: np.ndarray | Tensor) -> Rle:
    """COCO's compressed run-length form of a mask, equal to what pycocotools writes.

    Args:
        mask: (H, W), non-zero = inside.

    Returns:
        `{"size": [H, W], "counts": str}`.

    Raises:
        ValueError: `mask` does not have two dimensions.
    """
    mask = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    mask = mask if mask.dtype == bool else mask != 0
    if mask.ndim != 2:
        raise ValueError(f'"mask" must be (H, W), got shape {mask.shape}.')
    height, width = mask.shape
    # Runs go down the columns. Finding the few places where a pixel differs from the one before it and sorting
    # those is several times faster than transposing the picture.
    edges = np.empty_like(mask)
    edges[1:] = mask[1:] != mask[:-1]
    if mask.size:
        edges[0, 1:] = mask[0, 1:] != mask[-1, :-1]
        edges[0, 0] = mask[0, 0]
    rows, columns = np.divmod(np.flatnonzero(edges), max(width, 1))
    positions = np.sort(columns * height + rows)
    runs = np.diff(positions, prepend=0, append=mask.size)
    return {"size": [height, width], "counts": _runs_to_text(runs)}


def rle_to_mask(rle: Rle | Mapping[str, list[int] | str | bytes]) -> np.ndarray:
    """The mask of a COCO run-length form.

    Args:
        rle: `{"size": [H, W], "counts": ...}` with the counts as str or bytes (compressed) or as a list of run
            lengths (uncompressed, as in crowd annotations).

    Returns:
        (H, W) bool array.

    Raises:
        ValueError: the runs are damaged or do not fill the picture exactly.
    """
    (height, width), counts = rle["size"], rle["counts"]
    runs = _text_to_runs(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f'"rle" must hold runs that add up to {height} x {width} pixels, got {int(runs.sum())}.')
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def masks_to_rles(masks: Tensor | Sequence[np.ndarray]) -> list[Rle]:
    """COCO's compressed run-length form of several masks; moves them to the CPU once.

    Args:
        masks: (N, H, W), non-zero = inside.

    Returns:
        N dictionaries as from `mask_to_rle`.
    """
    return [mask_to_rle(mask) for mask in (masks.detach().cpu() if isinstance(masks, Tensor) else masks)]


def _float_type(values: Tensor) -> torch.dtype:
    """Float64 for float64 and float32 for all else: products of half-precision pixels overflow."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _product(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _safe_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, with 0 / 0 = 0. Only an exact 0 is replaced, so all other values and NaN stay as they are."""
    return part / torch.where(whole == 0, torch.ones_like(whole), whole)


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    boxes1, boxes2 = boxes1.to(_float_type(boxes1)), boxes2.to(_float_type(boxes2))
    sides = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    intersection = _product(sides.clamp(min=0))
    return intersection, box_area(boxes1) + box_area(boxes2) - intersection


def _first_and_last(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First index and last index + 1 of the True cells of (..., L); zeros where there is none."""
    cells = occupied.to(torch.uint8)
    last = occupied.shape[-1] - cells.flip(-1).argmax(dim=-1)
    return cells.argmax(dim=-1), last * occupied.any(dim=-1)


def _runs_to_text(runs: np.ndarray) -> str:
    """Run lengths as characters: differences to the run two before, five bits a character, lowest first."""
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2]
    position = np.arange(_MAX_GROUPS)
    groups = values[:, None] >> (5 * position)
    digits, remaining = groups & 31, groups >> 5
    # A group is the last one when what remains is nothing but its sign.
    last = np.where(digits & 16, remaining == -1, remaining == 0).argmax(axis=1)[:, None]
    characters = digits + 32 * (position < last) + 48
    return characters[position <= last].astype(np.uint8).tobytes().decode("ascii")


def _text_to_runs(text: str | bytes) -> np.ndarray:
    """The inverse of `_runs_to_text`."""
    codes = (
        np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, dtype=np.uint8).astype(np.int64) - 48
    )
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or ends.size == 0 or ends[-1] != codes.size - 1:
        raise ValueError('"rle" has damaged counts: not the characters of COCO\'s compressed run lengths.')
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _MAX_GROUPS:
        raise ValueError('"rle" has damaged counts: a run length of more than 35 bits.')
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


__all__ = [
    "Rle",
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_iou_aligned",
    "box_xywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "class_aware_nms",
    "clip_boxes",
    "generalized_box_iou",
    "generalized_box_iou_aligned",
    "mask_to_rle",
    "masks_to_boxes",
    "masks_to_rles",
    "rle_to_mask",
    "scale_boxes",
]
