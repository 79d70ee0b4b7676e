"""Prompt: the names, the sentence or the picture region that says which objects to find.

Source: UNINEXT (https://arxiv.org/abs/2303.06674), section 3.1, which names the three kinds: category names, language
expressions and reference annotations.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .task_uninext import PromptKind

Picture = Image.Image | np.ndarray | Tensor | str
"""PIL in any mode, numpy (H, W, 3) uint8, torch (3, H, W) uint8, or a path or URL; other channel counts (grey, RGBA)
and a missing channel dimension are taken too."""

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What to look for. Made with `Prompt.categories`, `Prompt.expression` or `Prompt.template`; always valid.

    Two prompts are equal when kind, phrases, box and mask are equal and the pictures are the same object (or the same
    path). The picture itself is not copied; do not write into it afterwards.

    Args:
        kind: a `PromptKind` or its value.
        phrases: K names for categories, one sentence for an expression, one display name for a template. Results refer
            to them by index.
        image: the reference picture of a template, otherwise None.
        box: the target in `image` as four numbers x0, y0, x1, y1 in its pixels (sequence, array or tensor); stored as
            floats. May reach over the border. PIL pictures are measured as displayed, EXIF orientation applied.
        mask: the target in `image`, (H, W) or (1, H, W) in its size, non-zero = target (array, tensor or PIL image of
            whole numbers, 0 or more); stored as a bool tensor (H, W) on the CPU.
        further: more references to the same target, templates of one reference each; made by `Prompt.templates`.

    Raises:
        ValueError: anything above does not hold; the message begins with the name of the argument.
    """

    kind: PromptKind
    phrases: tuple[str, ...]
    image: Picture | None = field(default=None, repr=False)
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = field(default=None, repr=False)
    further: tuple["Prompt", ...] = field(default=(), repr=False)

    @classmethod
    def categories(cls, names: Sequence[str]) -> "Prompt":
        """All objects of the named categories.

        Args:
            names: K >= 1 names, any language; labels in the results are indices into this list.

        Returns:
            The prompt.

        Raises:
            ValueError: `names` is empty, is one string, or holds something that is not a non-blank string.
        """
        return cls(PromptKind.CATEGORIES, names)

    @classmethod
    def expression(cls, text: str) -> "Prompt":
        """The one object a sentence describes.

        Args:
            text: the sentence.

        Returns:
            The prompt.

        Raises:
            ValueError: `text` is not a string or is blank.
        """
        return cls(PromptKind.EXPRESSION, (text,))

    @classmethod
    def template(
        cls,
        image: Picture,
        box: Sequence[float] | np.ndarray | Tensor | None = None,
        mask: np.ndarray | Tensor | Image.Image | None = None,
        name: str = "target",
    ) -> "Prompt":
        """The one object shown by a box or a mask in a reference picture.

        Args:
            image: the reference picture. A path or URL is opened only when the prompt is used.
            box: x0, y0, x1, y1 in pixels of `image`.
            mask: (H, W) in the size of `image`, non-zero = target. Exactly one of `box` and `mask` must be given.
            name: what to call the object in the results.

        Returns:
            The prompt.

        Raises:
            ValueError: see the class; for a path or URL, what depends on its size is checked by `check_image_size`.
        """
        return cls(PromptKind.TEMPLATE, (name,), image, box, mask)

    @classmethod
    def templates(cls, references: Sequence["Prompt | Mapping[str, object]"], name: str | None = None) -> "Prompt":
        """The one object shown by several references, for example at other times or from other sides.

        Their tokens stand one after the other in the prompt, so all of them have a say in every picture.

        Args:
            references: one or more templates, or dicts that make one; each picture with its own box or mask.
            name: what to call the object in the results; `None` for the name of the first reference.

        Returns:
            One prompt.

        Raises:
            ValueError: there are no references, or one is not a template; the message says which one.
        """
        if not isinstance(references, list | tuple) or not references:
            raise ValueError(f'"references" must be a list of one or more templates, got {_shown(references)}.')
        found = []
        for index, reference in enumerate(references):
            try:
                prompt = cls.from_value(reference)
            except ValueError as error:
                raise ValueError(f'"references" holds an unusable value at position {index}: {error}') from error
            if prompt.kind != PromptKind.TEMPLATE:
                raise ValueError(
                    f'"references" must hold templates only, got a prompt of kind {prompt.kind} at position {index}.'
                )
            found.extend(prompt.references)
        first, *further = found
        phrases = first.phrases if name is None else (name,)
        return cls(PromptKind.TEMPLATE, phrases, first.image, first.box, first.mask, tuple(further))

    @classmethod
    def from_value(cls, value: object) -> "Prompt":
        """The prompt meant by a plain value.

        Args:
            value: a `Prompt` (returned as it is); str -> expression; list or tuple of str -> categories; dict with
                "image", "box" or "mask", and optionally "name" -> template; dict with "references", a list of these,
                and optionally "name" -> template of several references.

        Returns:
            The prompt.

        Raises:
            ValueError: the value is none of these, or makes an illegal prompt.
        """
        # Not isinstance: the class loaded as remote code is not the installed one.
        if all(hasattr(value, name) for name in ("kind", "phrases", "image", "box", "mask")):
            return value
        if isinstance(value, str):
            return cls.expression(value)
        if isinstance(value, Mapping) and "references" in value and set(value) <= {"references", "name"}:
            return cls.templates(**value)
        if isinstance(value, Mapping):
            unknown = sorted(str(key) for key in value if key not in ("image", "box", "mask", "name"))
            if unknown or "image" not in value:
                raise ValueError(
                    '"prompt" given as a dict must have "image" and "box" or "mask" (or "references", a list of such '
                    f'dicts), optionally "name", got the keys {", ".join(map(str, value)) or "none"}.'
                )
            return cls.template(**value)
        if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            return cls.categories(value)
        raise ValueError(
            '"prompt" must be a Prompt, a string (one expression; a comma-separated string is an expression too), a '
            'list of names (categories), or a dict with "image" and "box" or "mask" (template), '
            f"got {_shown(value)}."
        )

    def __post_init__(self):
        try:
            kind = PromptKind(self.kind)
        except ValueError:
            raise ValueError(f'"kind" must be one of {", ".join(PromptKind)}, got {self.kind!r}.') from None
        set_field = object.__setattr__
        set_field(self, "kind", kind)
        set_field(self, "phrases", _checked_phrases(kind, self.phrases))
        if kind != PromptKind.TEMPLATE:
            for name in ("image", "box", "mask"):
                if getattr(self, name) is not None:
                    raise ValueError(f'"{name}" must be None for a prompt of kind {kind}; use Prompt.template for it.')
            if self.further:
                raise ValueError(f'"further" must be empty for a prompt of kind {kind}; use Prompt.templates for it.')
            return
        if isinstance(self.image, os.PathLike):
            set_field(self, "image", os.fspath(self.image))
        size = _picture_size(self.image)
        if (self.box is None) == (self.mask is None):
            given = "neither" if self.box is None else "both"
            raise ValueError(f'Exactly one of "box" and "mask" must be given for a template, got {given}.')
        if self.box is not None:
            set_field(self, "box", _checked_box(self.box))
        else:
            set_field(self, "mask", _checked_mask(self.mask))
        if size is not None:
            self.check_image_size(*size)
        set_field(self, "further", tuple(self.further))
        if not all(getattr(one, "kind", None) == kind and not one.further for one in self.further):
            raise ValueError(f'"further" must hold templates of one reference each, got {_shown(self.further)}.')

    @property
    def references(self) -> tuple["Prompt", ...]:
        """The references of a template, one prompt each; of another prompt, nothing."""
        if self.kind != PromptKind.TEMPLATE:
            return ()
        return (replace(self, further=()), *self.further)

    def check_image_size(self, height: int, width: int) -> None:
        """Check box or mask against the size of the reference picture; to be called once a path or URL is loaded.

        Args:
            height: of the reference picture as displayed, in pixels.
            width: of the reference picture as displayed, in pixels.

        Raises:
            ValueError: the box lies entirely outside the picture, or the mask has another size.
        """
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise ValueError(
                    f'"box" must overlap the reference image of {width} x {height} pixels (width x height), '
                    f"got {_format_box(self.box)}."
                )
        if self.mask is not None and tuple(self.mask.shape) != (height, width):
            raise ValueError(
                f'"mask" must have the size of the reference image, (H, W) = ({height}, {width}), '
                f"got {tuple(self.mask.shape)}."
            )

    def describe(self) -> str:
        """One line for logs and headings.

        Returns:
            The kind and the words, shortened after five names or 80 characters; for a template also where it is.
        """
        if self.kind == PromptKind.TEMPLATE:
            where = f"mask of {int(self.mask.sum())} pixels" if self.box is None else f"box {_format_box(self.box)}"
            more = f" and {len(self.further)} more references" if self.further else ""
            return f"{self.kind}: {self.phrases[0]}, {where}{more}"
        words = ", ".join(self.phrases[:5])
        words = words if len(words) <= 80 else words[:79] + "…"
        more = len(self.phrases) - 5
        return f"{self.kind}: {words}" + (f" and {more} more" if more > 0 else "")

    def __eq__(self, other: object) -> bool:
        """Equality by content, with pictures compared as objects and paths as text."""
        if not isinstance(other, Prompt):
            return NotImplemented
        if self._key() != other._key() or (self.mask is None) != (other.mask is None):
            return False
        return (self.mask is None or torch.equal(self.mask, other.mask)) and self.further == other.further

    def __hash__(self) -> int:
        """Hash that agrees with equality."""
        return hash(self._key())

    def _key(self) -> tuple:
        return self.kind, self.phrases, self.box, self.image if isinstance(self.image, str) else id(self.image)


def _checked_phrases(kind: PromptKind, phrases: object) -> tuple[str, ...]:
    if kind == PromptKind.CATEGORIES:
        if isinstance(phrases, str) or not isinstance(phrases, Sequence | np.ndarray):
            raise ValueError(
                f'"names" must be a list of strings, the phrases of a categories prompt, got {_shown(phrases)}. '
                "One sentence is Prompt.expression(text)."
            )
        if len(phrases) == 0:
            raise ValueError('"names" must hold at least one name, the phrases of a categories prompt, got none.')
        for index, name in enumerate(phrases):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f'"names" must hold non-blank strings, got {_shown(name)} at position {index}.')
        return tuple(str(name) for name in phrases)
    argument = "text" if kind == PromptKind.EXPRESSION else "name"
    if isinstance(phrases, str) or not isinstance(phrases, Sequence) or len(phrases) != 1:
        raise ValueError(
            f'"phrases" must be a tuple of one string for a prompt of kind {kind}, got {_shown(phrases)}.'
        )
    if not isinstance(phrases[0], str) or not phrases[0].strip():
        raise ValueError(f'"{argument}" must be a non-blank string, got {_shown(phrases[0])}.')
    return (str(phrases[0]),)


def _picture_size(image: object) -> tuple[int, int] | None:
    """(height, width) of a picture as displayed, or None for a path or URL, which is not opened here."""
    if isinstance(image, str):
        if not image.strip():
            raise ValueError('"image" must be a picture, a path or a URL, got a blank string.')
        return None
    if isinstance(image, Image.Image):
        width, height = image.size
        return (width, height) if image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS else (height, width)
    if isinstance(image, np.ndarray | Tensor):
        is_tensor = isinstance(image, Tensor)
        shape, is_uint8 = tuple(image.shape), image.dtype == (torch.uint8 if is_tensor else np.uint8)
        spatial = shape[-2:] if is_tensor else shape[:2]
        channels = shape[0 if is_tensor else -1] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or channels not in (1, 3, 4) or not is_uint8 or 0 in shape:
            expected = "torch tensor (3, H, W)" if is_tensor else "numpy array (H, W, 3)"
            raise ValueError(f'"image" must be uint8 if given as a {expected}, got shape {shape}, {image.dtype}.')
        return spatial
    raise ValueError(
        '"image" must be the reference picture of a template: a PIL image, a uint8 numpy array (H, W, 3), a uint8 '
        f"torch tensor (3, H, W), a path or a URL, got {_shown(image)}."
    )


def _checked_box(box: object) -> tuple[float, float, float, float]:
    values = box.tolist() if isinstance(box, np.ndarray | Tensor) else box
    try:
        x0, y0, x1, y1 = (None if isinstance(value, str) else float(value) for value in values)
        is_finite = bool(np.isfinite((x0, y0, x1, y1)).all())
    except (TypeError, ValueError):
        raise ValueError(
            f'"box" must be four numbers x0, y0, x1, y1 in pixels of the reference image, got {_shown(box)}.'
        ) from None
    if not is_finite:
        raise ValueError(f'"box" must hold finite numbers, got {_format_box((x0, y0, x1, y1))}.')
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            '"box" must have x1 > x0 and y1 > y0 in pixels of the reference image, '
            f"got {_format_box((x0, y0, x1, y1))}."
        )
    return x0, y0, x1, y1


def _checked_mask(mask: object) -> Tensor:
    if isinstance(mask, Tensor):
        # numpy has no bfloat16.
        values = mask.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
    elif isinstance(mask, np.ndarray | Image.Image):
        array = np.asarray(mask)
    else:
        raise ValueError(f'"mask" must be a numpy array, a torch tensor or a PIL image, got {_shown(mask)}.')
    shape = array.shape
    if array.ndim == 3 and shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f'"mask" must be (H, W) or (1, H, W), got shape {shape}.')
    if array.dtype.kind not in "biuf":
        raise ValueError(f'"mask" must be bool or numeric, got {array.dtype}.')
    if array.dtype.kind in "if" and not ((array >= 0) & (array == np.floor(array))).all():
        raise ValueError(
            '"mask" must hold whole numbers, 0 for background and above 0 for the target, got negative, fractional '
            "or non-finite values; threshold it first, for example mask > 0.5."
        )
    if not array.any():
        raise ValueError('"mask" must mark at least one pixel of the target, got all zeros.')
    return torch.from_numpy(array != 0)


def _format_box(box: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.10g}' for value in box)})"


def _shown(value: object) -> str:
    """Type and shortened text of a wrong value."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:79] + '…'}"


__all__ = ["Picture", "Prompt"]
