"""Captions, token ids and token positions against the official code's (origin: `tests/reference/README.md`)."""

import pytest
import torch

from uninext_hf.processing_uninext import UninextProcessor, clean_expression, clean_name
from uninext_hf.prompt_uninext import Prompt


@pytest.fixture(scope="module")
def processor():
    return UninextProcessor.for_model()


@pytest.mark.parametrize("name", ["custom", "coco", "ytvis_2019", "ovis"])
def test_categories(reference, processor, name):
    recorded, tokens = reference.case("prompts").meta["sets"][name], reference.text(name)
    assert ". ".join(map(clean_name, recorded["names"])) == recorded["prompt"]
    inputs = processor(prompts=recorded["names"], pad_to=256)
    for key, value in tokens.items():
        assert torch.equal(inputs[key], value)
    # Labels start at 1 in the recording and at 0 with us.
    positions = {str(label + 1): row.nonzero().flatten().tolist() for label, row in enumerate(inputs["label_map"][0])}
    assert positions == recorded["label_to_tokens"]
    assert not inputs["pool_prompt"].any()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_expressions(reference, processor, index):
    recorded, tokens = reference.case("prompts").meta["expressions"][index], reference.text(f"expression.{index}")
    assert clean_expression(recorded["raw"]) == recorded["cleaned"]
    inputs = processor(prompts=recorded["raw"], pad_to=256)
    for key, value in tokens.items():
        assert torch.equal(inputs[key], value)
    assert inputs["pool_prompt"].all()


def test_batch_is_padded_to_its_longest_prompt(reference, processor):
    expressions = [pair["raw"] for pair in reference.case("prompts").meta["expressions"]]
    inputs = processor(prompts=[Prompt.expression(text) for text in expressions])
    lengths = [int(reference.text(f"expression.{index}")["attention_mask"].sum()) for index in range(3)]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["input_ids"].shape == (3, max(lengths))
