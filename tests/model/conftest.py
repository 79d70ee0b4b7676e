"""A small model with spread weights, made once per process."""

import pytest
import torch

from uninext_hf.configuration_uninext import UninextConfig
from uninext_hf.modeling_uninext import UninextForUniversalPerception


def spread(model: torch.nn.Module, scale: float = 0.08) -> torch.nn.Module:
    """Give layers that start at zero a spread, so that prompts, queries and levels matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def build(**overrides) -> UninextForUniversalPerception:
    torch.manual_seed(0)
    return spread(UninextForUniversalPerception(UninextConfig.from_preset("tiny", **overrides))).eval()


@pytest.fixture(scope="session")
def tiny():
    """Shared, never change it."""
    return build()


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text():
    ids = torch.randint(1000, 30000, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def templates():
    values = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[0, 40:] = False
    return {"template_values": values, "template_mask": mask}
