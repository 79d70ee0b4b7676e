"""Reference cases and the models they were recorded with."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from uninext_hf.conversion import load_official

FOLDER = Path(__file__).resolve().parents[1] / "reference"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "reference"
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def _module(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Reference:
    """Cases, weights and models by name; each is made once per process."""

    _full: ClassVar[dict] = {}

    @staticmethod
    @cache
    def case(name: str):
        """A recorded case; the full-size ones lie beside the checkout only."""
        for folder in (FOLDER, SHARED):
            path = folder / "golden" / f"{name}.safetensors"
            if path.is_file():
                return _module("golden").load_case(str(path))
        pytest.skip(f"needs ../shared/reference/golden/{name}.safetensors, which only the project's own machines have")

    @staticmethod
    def weights(manifest: str, **options):
        """State dict under the official names."""
        return _module("reference_weights").build_state_dict(
            str(FOLDER / "manifests" / Path(manifest).with_suffix(".json").name), **options
        )

    @classmethod
    @cache
    def tiny(cls, manifest: str):
        """Our model with the weights of a reduced manifest; shared, so never change it."""
        return load_official(cls.weights(manifest))

    @classmethod
    def full(cls, manifest: str):
        """Our model at full size; only the last one is kept, the largest takes 6 GB."""
        if manifest not in cls._full:
            cls._full.clear()
            cls._full[manifest] = load_official(cls.weights(manifest))
        return cls._full[manifest]

    @classmethod
    def batch(cls, case) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures of a case padded to one batch, and its pixel mask."""
        names = sorted(name for name in case.tensors if name.startswith("input.image."))
        pictures = [cls.pixels(case.tensors[name])[0] for name in names]
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
        pixels = torch.zeros(len(pictures), 3, height, width)
        mask = torch.zeros(len(pictures), height, width, dtype=torch.int64)
        for row, picture in enumerate(pictures):
            pixels[row, :, : picture.shape[1], : picture.shape[2]] = picture
            mask[row, : picture.shape[1], : picture.shape[2]] = 1
        return pixels, mask

    @staticmethod
    def pixels(image: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 -> (1, 3, H, W) normalised, as the official code does it."""
        return ((image.float() - MEAN) / STD)[None]

    @classmethod
    def text(cls, name: str) -> dict[str, torch.Tensor]:
        """Recorded token ids and mask of a prompt, padded to 256."""
        tensors = cls.case("prompts").tensors
        return {key: tensors[f"{name}.{key}"].long() for key in ("input_ids", "attention_mask")}

    @classmethod
    def template(cls, case) -> dict[str, torch.Tensor]:
        """Crop of a tracking case as our tensors, cut anew from its first frame: only a sample of it is recorded."""
        from uninext_hf.image_processing_uninext import crop_template

        pixels = cls.pixels(case.tensors["input.frames"][0])[0]
        target = case.tensors.get("input.mask")
        values, mask = crop_template(
            pixels,
            torch.ones(pixels.shape[1:]),
            case.tensors["template.0.box_xywh"][0].tolist(),
            None if target is None else target[0].float(),
        )
        return {"template_values": values[None], "template_mask": mask[None]}


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    """Access to the recorded values."""
    return Reference
