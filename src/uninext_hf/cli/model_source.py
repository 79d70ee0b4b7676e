"""What `--model` may name: a folder, a Hub repository, or `preset:NAME` for random weights of a known shape."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, set_seed

from .. import PRESETS, UninextConfig, UninextForUniversalPerception, UninextProcessor

PRESET = "preset:"
RANDOM_WEIGHTS = "random weights: boxes, masks and scores are meaningless"


class Model(NamedTuple):
    """A model ready to use, and what must be said about it wherever its results are shown."""

    model: PreTrainedModel
    processor: UninextProcessor
    warning: str | None


def load(source: str, dtype: str = "float32", seed: int = 0) -> Model:
    """Load what `--model` names.

    Raises:
        ValueError: there is no such preset.
        OSError: there is no such folder or repository, or it is incomplete.
    """
    if source.startswith(PRESET):
        name = source.removeprefix(PRESET)
        if name not in PRESETS:
            raise ValueError(f'"--model preset:NAME" must name one of {", ".join(PRESETS)}, got {name!r}.')
        set_seed(seed)
        config = UninextConfig.from_preset(name)
        model = UninextForUniversalPerception(config).to(getattr(torch, dtype)).eval()
        return Model(model, UninextProcessor.for_model(config), RANDOM_WEIGHTS)
    model = UninextForUniversalPerception.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    return Model(model, UninextProcessor.from_pretrained(source), None)
