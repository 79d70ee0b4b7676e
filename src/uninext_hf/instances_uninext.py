"""Instances: what was found in one picture or video frame, and how to index, join, export and draw it."""

import operator
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor
from transformers.image_utils import load_image

from .box_ops_uninext import clip_boxes, mask_to_rle, masks_to_boxes, masks_to_rles

_INTEGER_FIELDS = ("labels", "track_ids", "prompt_ids")


@dataclass(frozen=True, eq=False, repr=False)
class Instances:
    """N objects found in one picture or frame; row i of every field is the same object.

    Frozen: every operation returns a new value. Beside attributes, `instances["scores"]` works, as for the result
    dictionaries of transformers.

    Args:
        image_size: (height, width) of the original picture in pixels.
        phrases: K texts of the prompt, to which `labels` point.
        scores: (N,) in [0, 1]; kept as float32.
        labels: (N,) indices into `phrases`; kept as int64.
        boxes: (N, 4) as (x0, y0, x1, y1) in pixels of the original picture; kept as float32.
        masks: (N, height, width) bool, or None.
        track_ids: (N,) identities across frames, -1 = none; kept as int64, or None.
        prompt_ids: (N,) which prompt of a video session found the object; kept as int64, or None.
        embeddings: (N, D) appearance vectors; kept as float32, or None.

    Raises:
        ValueError: a field has another shape, number of rows, type or device, or a label points past `phrases`
            (checked on the CPU only, since looking at values makes a GPU wait).
    """

    image_size: tuple[int, int]
    phrases: list[str]
    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    track_ids: Tensor | None = None
    prompt_ids: Tensor | None = None
    embeddings: Tensor | None = None

    def __post_init__(self):
        set_field = object.__setattr__
        try:
            height, width = (operator.index(side) for side in self.image_size)
        except (TypeError, ValueError):
            height = width = 0
        if height < 1 or width < 1:
            raise ValueError(f'"image_size" must be two positive integers (height, width), got {self.image_size!r}.')
        set_field(self, "image_size", (height, width))
        if isinstance(self.phrases, str) or not all(isinstance(phrase, str) for phrase in self.phrases):
            raise ValueError(f'"phrases" must be a list of strings, got {self.phrases!r}.')
        set_field(self, "phrases", list(self.phrases))
        if not isinstance(self.scores, Tensor) or self.scores.ndim != 1:
            raise ValueError(f'"scores" must be a tensor (N,), got {_shape_of(self.scores)}.')
        rows, device = len(self.scores), self.scores.device
        shapes = dict.fromkeys(_ROW_FIELDS, (rows,))
        shapes |= {"boxes": (rows, 4), "masks": (rows, height, width), "embeddings": (rows, -1)}
        for name in _ROW_FIELDS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_FIELDS:
                continue
            if not isinstance(value, Tensor) or not _fits(value.shape, shapes[name]):
                wanted = str(shapes[name]).replace("-1", "D")
                raise ValueError(
                    f'"{name}" must be a tensor {wanted} for {rows} scores and image_size {self.image_size}, '
                    f"got {_shape_of(value)}."
                )
            if value.device != device:
                raise ValueError(f'"{name}" must be on {device} like "scores", got {value.device}.')
            set_field(self, name, _with_field_type(name, value))
        if rows and device.type == "cpu" and not 0 <= self.labels.min() <= self.labels.max() < len(self.phrases):
            raise ValueError(f'"labels" must be in [0, {len(self.phrases)}), got {self.labels.tolist()}.')

    @classmethod
    def empty(
        cls,
        image_size: tuple[int, int],
        phrases: Sequence[str],
        with_masks: bool = False,
        device: torch.device | str | None = None,
    ) -> "Instances":
        """Nothing found.

        Args:
            image_size: (height, width) of the original picture in pixels.
            phrases: the texts of the prompt.
            with_masks: whether `masks` is (0, height, width) instead of None.
            device: where the tensors live.

        Returns:
            Instances with no rows.
        """
        return cls(
            image_size=image_size,
            phrases=list(phrases),
            scores=torch.zeros(0, device=device),
            labels=torch.zeros(0, dtype=torch.int64, device=device),
            boxes=torch.zeros(0, 4, device=device),
            masks=torch.zeros(0, *image_size, dtype=torch.bool, device=device) if with_masks else None,
        )

    @classmethod
    def concat(cls, parts: Sequence["Instances"], fill_missing: bool = False) -> "Instances":
        """The rows of several results of the same picture, one after the other.

        If all parts have the same phrases, these are kept. Otherwise the phrase lists are joined, repeated ones
        included, and labels are moved on accordingly, so every row keeps its text and parts stay apart.

        Args:
            parts: one or more, all with the same `image_size`. A part without rows fits any optional fields.
            fill_missing: where only some parts have an optional field, give the rows of the others an empty mask, the
                id -1 or a zero embedding instead of raising.

        Returns:
            Instances with the sum of the rows.

        Raises:
            ValueError: no parts, different picture sizes, or (unless `fill_missing`) an optional field that only some
                of the parts with rows have.
        """
        parts = list(parts)
        if not parts:
            raise ValueError('"parts" must hold at least one Instances: without any, the picture size is unknown.')
        sizes = {part.image_size for part in parts}
        if len(sizes) > 1:
            raise ValueError(f'"parts" must all have the same image_size, got {sorted(sizes)}.')
        phrases, offsets = parts[0].phrases, [0] * len(parts)
        if any(part.phrases != phrases for part in parts):
            phrases = [phrase for part in parts for phrase in part.phrases]
            offsets = np.cumsum([0] + [len(part.phrases) for part in parts[:-1]]).tolist()
        columns = {"labels": torch.cat([part.labels + offset for part, offset in zip(parts, offsets, strict=True)])}
        for name in ("scores", "boxes"):
            columns[name] = torch.cat([getattr(part, name) for part in parts])
        for name in _OPTIONAL_FIELDS:
            given = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            rows_without = sum(len(part) for part in parts if getattr(part, name) is None)
            if not given or (rows_without and not fill_missing and not any(len(value) for value in given)):
                continue
            if rows_without and not fill_missing:
                raise ValueError(f'"parts" must all have "{name}" or all lack it; {rows_without} rows are without it.')
            filler = -1 if name in _INTEGER_FIELDS else 0
            columns[name] = torch.cat(
                [
                    given[0].new_full((len(part), *given[0].shape[1:]), filler)
                    if getattr(part, name) is None
                    else getattr(part, name)
                    for part in parts
                ]
            )
        return cls(image_size=parts[0].image_size, phrases=phrases, **columns)

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, key: Literal["text_labels"]) -> list[str]: ...

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: int | slice | Tensor | np.ndarray | Sequence[int]) -> "Instances": ...

    def __getitem__(self, key):
        """A field by name, or some of the rows as new Instances.

        Args:
            key: a name from `keys()`; or an int (gives one row), a slice, a bool mask (N,), or indices (M,) as a
                tensor, array or list.

        Raises:
            KeyError: there is no such field here.
            IndexError: rows that do not exist, or a bool mask of another length.
        """
        if isinstance(key, str):
            if key not in self:
                raise KeyError(f"{key!r} is not one of {', '.join(self.keys())}.")
            return getattr(self, key)
        index = self._row_index(key)
        return self.replace(**{name: getattr(self, name)[index] for name in self._row_fields()})

    def __iter__(self) -> Iterator["Instances"]:
        """One Instances of one row after the other."""
        return (self[row] for row in range(len(self)))

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def keys(self) -> list[str]:
        """Names that can be used as `instances[name]`.

        Returns:
            The row fields that are not None, and "text_labels".
        """
        return [*self._row_fields(), "text_labels"]

    @property
    def text_labels(self) -> list[str]:
        """The phrase of each row, N strings."""
        return [self.phrases[label] for label in self.labels.tolist()]

    def replace(self, **changes: tuple[int, int] | Sequence[str] | Tensor | None) -> "Instances":
        """A copy with some fields changed.

        Args:
            **changes: fields of the class and their new values; checked as in the constructor.

        Returns:
            New Instances; unchanged tensors are shared.

        Raises:
            ValueError: the fields do not fit together.
            TypeError: there is no such field.
        """
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> "Instances":
        """A copy on another device.

        Args:
            device: where the tensors shall live.

        Returns:
            New Instances.
        """
        return self.replace(**{name: getattr(self, name).to(device) for name in self._row_fields()})

    def cpu(self) -> "Instances":
        """A copy on the CPU.

        Returns:
            New Instances.
        """
        return self.to("cpu")

    def to_dict(self) -> dict[str, Tensor | list[str]]:
        """The result dictionary of the detection models in transformers.

        Returns:
            The row fields that are not None under their own names ("scores", "labels", "boxes", "masks", ...) and
            "text_labels", the phrase of each row.
        """
        return {name: self[name] for name in self.keys()}

    def to_json(self) -> dict[str, list[int] | list[str] | list[dict[str, object]]]:
        """Plain Python values for `json.dump`.

        Returns:
            "image_size" [height, width], "phrases", and "instances": for each row "text", "label", "score" (6
            decimals), "box" [x0, y0, x1, y1] in pixels (3 decimals) and, where present, "mask" (COCO's compressed
            run-length form), "track_id" and "prompt_id". Embeddings are left out.
        """
        rows = self.cpu()
        columns = {
            "text": rows.text_labels,
            "label": rows.labels.tolist(),
            "score": [round(score, 6) for score in rows.scores.tolist()],
            "box": [[round(value, 3) for value in box] for box in rows.boxes.tolist()],
        }
        if rows.masks is not None:
            columns["mask"] = masks_to_rles(rows.masks)
        if rows.track_ids is not None:
            columns["track_id"] = rows.track_ids.tolist()
        if rows.prompt_ids is not None:
            columns["prompt_id"] = rows.prompt_ids.tolist()
        return {
            "image_size": list(self.image_size),
            "phrases": list(self.phrases),
            "instances": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }

    def to_coco(self, image_id: int | str = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, object]]:
        """Entries of a COCO results file.

        Args:
            image_id: the picture's id in the annotation file.
            category_ids: the annotation file's category id of each phrase, (K,); without it, the label itself.

        Returns:
            A dictionary for each row: "image_id", "category_id", "bbox" [x0, y0, width, height] in pixels, "score",
            and with masks "segmentation" (compressed run-length form with string counts).

        Raises:
            ValueError: the number of category ids is not the number of phrases.
        """
        if category_ids is not None and len(category_ids) != len(self.phrases):
            raise ValueError(
                f'"category_ids" must hold one id for each of {len(self.phrases)} phrases, got {len(category_ids)}.'
            )
        rows = self.cpu()
        results = []
        for row in range(len(rows)):
            x0, y0, x1, y1 = rows.boxes[row].tolist()
            label = int(rows.labels[row])
            result = {
                "image_id": image_id,
                "category_id": label if category_ids is None else int(category_ids[label]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(rows.scores[row]),
            }
            if rows.masks is not None:
                result["segmentation"] = mask_to_rle(rows.masks[row])
            results.append(result)
        return results

    def to_supervision(self) -> object:
        """The same rows for the `supervision` library.

        Returns:
            `supervision.Detections` with numpy copies; phrases are in `data["class_name"]` and prompt ids, where
            present, in `data["prompt_id"]`.

        Raises:
            ImportError: supervision is not installed.
        """
        # The try also keeps transformers from asking for supervision when this file is loaded as remote code.
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError('to_supervision() needs supervision: pip install "uninext-hf[video]"') from error
        rows = self.cpu()
        data = {"class_name": np.array(rows.text_labels, dtype=np.str_)}
        if rows.prompt_ids is not None:
            data["prompt_id"] = rows.prompt_ids.numpy().copy()
        return Detections(
            xyxy=rows.boxes.numpy().copy(),
            mask=None if rows.masks is None else rows.masks.numpy().copy(),
            confidence=rows.scores.numpy().copy(),
            class_id=rows.labels.numpy().copy(),
            tracker_id=None if rows.track_ids is None else rows.track_ids.numpy().copy(),
            data=data,
        )

    def draw(
        self,
        image: Image.Image | np.ndarray | Tensor | str,
        color_by: Literal["label", "instance", "track"] = "label",
        labels: bool = True,
        scores: bool = True,
        mask_opacity: float = 0.4,
        banner: str | None = None,
    ) -> Image.Image:
        """The picture with every row drawn on it: mask, box, and a tag with phrase, track id and score.

        Lines and letters grow with the picture. Tags stay inside the picture and avoid each other where there is room;
        a picture too small for readable letters gets none. Letters come from the font inside Pillow; for other
        alphabets common system fonts (DejaVu, Noto, ...) are tried, and a phrase that none of them can write, or
        right-to-left text without a Pillow built with raqm, is shown as "label" and its number.

        Args:
            image: the original picture: PIL in any mode (shown as its EXIF orientation says), numpy (H, W, 3) uint8,
                torch (3, H, W) uint8, a path or a URL. It is not changed.
            color_by: what shares a colour: rows of one label, nothing, or rows of one track.
            labels: whether tags hold phrase and track id.
            scores: whether tags hold the score.
            mask_opacity: of the fill, in [0, 1]; outlines are always solid.
            banner: a line written on a strip over the top of the picture; broken into several lines if it is long.

        Returns:
            A new RGB picture of the same size.

        Raises:
            ValueError: the picture is of another kind or size than `image_size`, an argument is out of range, or
                colours by track are asked for without track ids.
        """
        if color_by not in ("label", "instance", "track"):
            raise ValueError(f'"color_by" must be "label", "instance" or "track", got {color_by!r}.')
        if color_by == "track" and self.track_ids is None:
            raise ValueError('"color_by" can be "track" only if there are track_ids, got none.')
        if not 0 <= mask_opacity <= 1:
            raise ValueError(f'"mask_opacity" must be in [0, 1], got {mask_opacity}.')
        canvas = _to_rgb_picture(image)
        if canvas.size != self.image_size[::-1]:
            raise ValueError(
                f'"image" must have the image_size of these instances, (height, width) = {self.image_size}, '
                f"got {canvas.size[::-1]}."
            )
        rows = self.cpu()
        color_keys = {"label": rows.labels, "instance": torch.arange(len(rows)), "track": rows.track_ids}[color_by]
        colors = [_PALETTE[key % len(_PALETTE)] for key in color_keys.tolist()]
        boxes = _pixel_boxes(rows.boxes, self.image_size)
        # Large ones first, so that small ones stay visible.
        paint_order = np.argsort(-_areas(boxes), kind="stable").tolist()
        line = max(1, round(0.004 * (canvas.width * canvas.height) ** 0.5))
        if rows.masks is not None:
            canvas = _paint_masks(canvas, rows.masks, colors, paint_order, mask_opacity, line)
        for row in paint_order:
            _draw_box(canvas, boxes[row], colors[row], line if rows.masks is None else max(1, line // 2))
        top = _draw_banner(canvas, banner) if banner else 0
        tags = [_tag_parts(rows, row, labels, scores) for row in range(len(rows))]
        _draw_tags(canvas, tags, boxes, colors, rows.scores.argsort(descending=True, stable=True).tolist(), top)
        return canvas

    def __repr__(self) -> str:
        shown = [f"{text} {score:.2f}" for text, score in zip(self.text_labels, self.scores.tolist(), strict=True)][:5]
        if len(self) > len(shown):
            shown.append(f"{len(self) - len(shown)} more")
        optional = [name for name in _OPTIONAL_FIELDS if getattr(self, name) is not None]
        height, width = self.image_size
        return (
            f"Instances({len(self)} in a picture of {width} x {height}"
            + (f": {', '.join(shown)}" if shown else "")
            + (f"; with {', '.join(optional)}" if optional else "")
            + ")"
        )

    def _row_fields(self) -> list[str]:
        return [name for name in _ROW_FIELDS if getattr(self, name) is not None]

    def _row_index(self, key: object) -> slice | Tensor:
        if isinstance(key, slice):
            return key
        if isinstance(key, np.ndarray | Tensor | list | tuple):
            index = torch.as_tensor(key, device=self.scores.device)
            if index.ndim > 0:
                if index.ndim > 1 or (index.is_floating_point() and index.numel()):
                    raise IndexError(
                        f"rows are chosen by a bool mask or indices of one dimension, got {_shape_of(index)}."
                    )
                if index.dtype != torch.bool:
                    return index.to(torch.int64)
                if len(index) != len(self):
                    raise IndexError(f"the bool mask has {len(index)} values for {len(self)} rows.")
                return index
            key = index.item()
        if isinstance(key, bool):
            raise IndexError("a single bool does not choose rows; use a bool mask (N,).")
        row = operator.index(key)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} does not exist, there are {len(self)}.")
        return slice(row % len(self), row % len(self) + 1)


_ROW_FIELDS = tuple(field.name for field in fields(Instances))[2:]
_OPTIONAL_FIELDS = ("masks", "track_ids", "prompt_ids", "embeddings")

# Greedy farthest points in the OKLab colour space among colours that are neither pale, dark nor neon: the first k are
# far apart for every k.
_PALETTE_BYTES = bytes.fromhex(
    "f03c2d 2dff87 0069f0 4b780f e1b4ff b42db4 f0b400 0fb4c3 ff69b4 78b400"
    "b4780f a578ff 69f0ff a54b69 f09687 0f78a5 b4e196 785ab4 69a5ff 00d296"
)
_PALETTE = [tuple(color) for color in np.frombuffer(_PALETTE_BYTES, dtype=np.uint8).reshape(-1, 3).tolist()]
_DARK, _LIGHT = (16, 16, 16), (255, 255, 255)

# Tried in this order when the font inside Pillow lacks a character: names as installed by Linux distributions, macOS
# and Windows.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "arial.ttf",
    "msyh.ttc",
)
_MIN_FONT_SIZE = 7
_UNASSIGNED = "\U0010fffe"

_Color = tuple[int, ...]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _shape_of(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (have, -1) for have, want in zip(shape, wanted, strict=True))


def _with_field_type(name: str, value: Tensor) -> Tensor:
    """The value in the type its field is kept in, or an error if that would change its meaning."""
    if name == "masks":
        is_legal, kind, dtype = value.dtype == torch.bool, "bool", torch.bool
    elif name in _INTEGER_FIELDS:
        is_legal = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        kind, dtype = "integers", torch.int64
    else:
        is_legal, kind, dtype = value.is_floating_point(), "floating point numbers", torch.float32
    if not is_legal:
        raise ValueError(f'"{name}" must hold {kind}, got {value.dtype}.')
    return value.to(dtype)


def _to_rgb_picture(image: object) -> Image.Image:
    """A new RGB picture from any of the accepted kinds."""
    if isinstance(image, str):
        return load_image(image)
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, Tensor):
        array = image.detach().cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(f'"image" must be a PIL image, numpy array, torch tensor, path or URL, got {type(image)}.')
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(
            '"image" must be a numpy array (H, W, 3) uint8 or a torch tensor (3, H, W) uint8, '
            f"got shape {tuple(image.shape)}, {image.dtype}."
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _pixel_boxes(boxes: Tensor, image_size: tuple[int, int]) -> np.ndarray:
    """(N, 4) int corner pixels, both inclusive, inside the picture; at least one pixel each, whatever comes in."""
    height, width = image_size
    clipped = clip_boxes(boxes.nan_to_num(0.0), image_size).numpy()
    limit = (width - 1, height - 1)
    first = np.minimum(np.floor(np.minimum(clipped[:, :2], clipped[:, 2:])), limit)
    last = np.clip(np.ceil(np.maximum(clipped[:, :2], clipped[:, 2:])) - 1, first, limit)
    return np.concatenate((first, last), axis=1).astype(np.int64)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _paint_masks(
    canvas: Image.Image, masks: Tensor, colors: list[_Color], order: list[int], opacity: float, line: int
) -> Image.Image:
    """A copy of the picture with translucent masks and their solid outlines, painted in the given order."""
    pixels = np.array(canvas)
    for row, (x0, y0, x1, y1) in zip(order, masks_to_boxes(masks)[order].long().tolist(), strict=True):
        if x1 == 0:
            continue
        inside = masks[row, y0:y1, x0:x1].numpy()
        outline = inside & _near_outside(inside, line, (x0 > 0, y0 > 0, x1 < canvas.width, y1 < canvas.height))
        part = pixels[y0:y1, x0:x1]
        part[inside] = (part[inside] * (1 - opacity) + np.array(colors[row]) * opacity).round()
        part[outline] = colors[row]
    return Image.fromarray(pixels)


def _near_outside(inside: np.ndarray, distance: int, has_border: tuple[bool, bool, bool, bool]) -> np.ndarray:
    """Pixels at most `distance` steps from outside; what lies over a side without border is not outside."""
    near = np.pad(~inside, 1)
    near[:, 0], near[0], near[:, -1], near[-1] = has_border
    for _ in range(distance):
        before = near.copy()
        near[1:] |= before[:-1]
        near[:-1] |= before[1:]
        near[:, 1:] |= before[:, :-1]
        near[:, :-1] |= before[:, 1:]
    return near[1:-1, 1:-1]


def _draw_box(canvas: Image.Image, box: np.ndarray, color: _Color, line: int) -> None:
    """A box with a faint dark rim, which keeps its colour visible on a background of the same colour."""
    x0, y0, x1, y1 = box.tolist()
    brush = ImageDraw.Draw(canvas, "RGBA")
    brush.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(*_DARK, 110))
    inner = (x0 + line, y0 + line, x1 - line, y1 - line)
    if inner[0] <= inner[2] and inner[1] <= inner[3]:
        brush.rectangle(inner, outline=(*_DARK, 110))
    brush.rectangle((x0, y0, x1, y1), outline=color, width=line)


def _tag_parts(instances: Instances, row: int, labels: bool, scores: bool) -> tuple[str, str, str]:
    """The phrase, what replaces it if it cannot be written, and what follows it."""
    suffix = ""
    if labels and instances.track_ids is not None and instances.track_ids[row] >= 0:
        suffix += f" #{int(instances.track_ids[row])}"
    if scores:
        # Two spaces: one is hardly visible in small letters.
        suffix += f"  {float(instances.scores[row]):.2f}"
    if not labels:
        return "", "", suffix.strip()
    label = int(instances.labels[row])
    return " ".join(instances.phrases[label].split()), f"label {label}", suffix


def _draw_tags(
    canvas: Image.Image,
    tags: list[tuple[str, str, str]],
    boxes: np.ndarray,
    colors: list[_Color],
    order: list[int],
    top: int,
) -> None:
    """Write the tags in the given order, each where it covers least; nothing above row `top` of the picture."""
    size = _font_size(canvas, top, many=len(tags) > 12)
    if size < _MIN_FONT_SIZE:
        return
    pad = max(2, size // 5)
    height = _line_height(size) + pad + 2
    rim = max(1, size // 14)
    brush = ImageDraw.Draw(canvas)
    written = []
    placed = np.zeros((0, 4), dtype=np.int64)
    for row in order:
        text, font = _fit_text(*tags[row], size, canvas.width - 2 * pad)
        if not text:
            continue
        tag_size = (_text_width(font, text) + 2 * pad, height)
        place = _place_tag(boxes[row], tag_size, canvas.size, top, placed, boxes)
        placed = np.concatenate((placed, [place]))
        written.append((row, place, text, font))
        _draw_leader(brush, place, boxes[row].tolist(), colors[row], rim)
    for row, (x0, y0, x1, y1), text, font in written:
        brush.rectangle((x0, y0, x1, y1), fill=colors[row], outline=_DARK if len(written) > 1 else None)
        left, _, _, bottom = font.getbbox(_TALL_TEXT)
        brush.text((x0 + pad - left, y1 - pad // 2 - bottom), text, fill=_text_color(colors[row]), font=font)


def _draw_leader(
    brush: ImageDraw.ImageDraw, place: tuple[int, int, int, int], box: list[int], color: _Color, line: int
) -> None:
    """A line from a tag to its box, if they are apart."""
    x = (max(place[0], box[0]) + min(place[2], box[2])) // 2
    if place[3] < box[1] - 1:
        brush.line((x, place[3], x, box[1]), fill=color, width=line)
    elif place[1] > box[3] + 1:
        brush.line((x, box[3], x, place[1]), fill=color, width=line)


def _place_tag(
    box: np.ndarray,
    tag_size: tuple[int, int],
    canvas_size: tuple[int, int],
    top: int,
    placed: np.ndarray,
    boxes: np.ndarray,
) -> tuple[int, int, int, int]:
    """Where a tag near its box hides the least of earlier tags, then of small boxes; corners inclusive."""
    (width, height), (x0, y0, x1, y1) = tag_size, box.tolist()
    left, right, middle = x0, x1 + 1 - width, (x0 + x1 + 1 - width) // 2
    above, below, inside_below = y0 - height, y1 + 1, y1 + 1 - height
    places = [(x, y) for x in (left, right, middle) for y in (above, y0, below, inside_below)]
    places += [(x0 - width, y0), (x1 + 1, y0), (middle, (y0 + y1 - height) // 2)]
    # Farther and farther away, for crowds; the tag is then joined to its box by a line.
    for step in range(1, 6):
        places += [(x, y) for x in (left, right) for y in (above - step * height, below + step * height)]
    limits = (max(canvas_size[0] - width, 0), max(canvas_size[1] - height, top))
    first = np.clip(np.array(places), (0, top), limits)
    candidates = np.concatenate((first, first + np.array((width - 1, height - 1))), axis=1)
    gap = np.maximum(candidates[:, 1] - y1, y0 - candidates[:, 3]).clip(min=1) - 1
    cost = 20 * _overlaps(candidates, placed).sum(axis=1) / (width * height)
    cost += (_overlaps(candidates, boxes) / _areas(boxes)).sum(axis=1)
    # Among equals, earlier places are the more usual ones.
    cost += 0.15 * gap / height + 0.01 * np.arange(len(candidates))
    return tuple(candidates[np.argmin(cost)].tolist())


def _overlaps(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """(N, M) common areas of boxes with inclusive corners."""
    first = np.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    last = np.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    return np.clip(last - first + 1, 0, None).prod(axis=-1)


def _draw_banner(canvas: Image.Image, text: str) -> int:
    """Write a strip over the top, in several lines if needed; returns its height in pixels."""
    size = _font_size(canvas, 0, many=False)
    if size < _MIN_FONT_SIZE:
        return 0
    pad = max(2, size // 4)
    lines, rest = [], text.split()
    while rest:
        count = len(rest)
        while count > 1:
            line, font = " ".join(rest[:count]), _font_for(" ".join(rest[:count]), size)
            if font is None or _text_width(font, line) <= canvas.width - 2 * pad:
                break
            count -= 1
        lines.append(" ".join(rest[:count]))
        rest = rest[count:]
    step = _line_height(size) + pad
    lines = lines[: max(1, (canvas.height // 2 - pad) // step)]
    height = min(canvas.height, step * len(lines) + pad)
    brush = ImageDraw.Draw(canvas, "RGBA")
    brush.rectangle((0, 0, canvas.width - 1, height - 1), fill=(*_DARK, 215))
    for number, line in enumerate(lines):
        shown, font = _fit_text(line, line.encode("ascii", "replace").decode(), "", size, canvas.width - 2 * pad)
        left, _, _, bottom = font.getbbox(_TALL_TEXT)
        brush.text((pad - left, (number + 1) * step - bottom), shown, fill=_LIGHT, font=font)
    return height


_TALL_TEXT = "Agjy|"


def _font_size(canvas: Image.Image, top: int, many: bool) -> int:
    """Pixels; follows the picture, smaller where many tags must fit, and no more than half of its height."""
    size = max(11, 0.026 * (canvas.width * canvas.height) ** 0.5) * (0.85 if many else 1)
    return int(min(size, (canvas.height - top) / 2))


def _line_height(size: int) -> int:
    _, upper, _, lower = _open_font(None, size).getbbox(_TALL_TEXT)
    return int(lower - upper)


def _text_width(font: _Font, text: str) -> int:
    left, _, right, _ = font.getbbox(text)
    return int(right - left)


def _text_color(background: _Color) -> _Color:
    red, green, blue = background
    return _DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else _LIGHT


def _fit_text(text: str, fallback: str, suffix: str, size: int, limit: int) -> tuple[str, _Font]:
    """The longest beginning of `text`, then `suffix`, within `limit` pixels; "" if not even two letters fit."""
    font = _font_for(text + suffix, size)
    if font is None:
        text, font = fallback, _open_font(None, size)
    if _text_width(font, text + suffix) <= limit:
        return text + suffix, font
    for count in range(len(text) - 1, 1, -1):
        shown = text[:count].rstrip() + "..." + suffix
        if _text_width(font, shown) <= limit:
            return shown, font
    return "", font


def _font_for(text: str, size: int) -> _Font | None:
    """The first font that has all characters of the text, or None."""
    is_right_to_left = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
    if is_right_to_left and not features.check("raqm"):
        return None
    for name in (None, *_SYSTEM_FONTS):
        font = _open_font(name, size)
        if font is not None and all(_has_glyph(name, size, character) for character in set(text)):
            return font
    return None


@lru_cache(maxsize=256)
def _open_font(name: str | None, size: int) -> _Font | None:
    """A system font by file name, or the one inside Pillow for None; None if it is not installed."""
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):
        return None


@lru_cache(maxsize=4096)
def _has_glyph(name: str | None, size: int, character: str) -> bool:
    """Whether a font can write a character, seen by its picture not being that of a character nobody has."""
    font = _open_font(name, size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        return character.isascii()
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(_UNASSIGNED))


__all__ = ["Instances"]
