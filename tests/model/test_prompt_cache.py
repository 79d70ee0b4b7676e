"""Prompt features from the cache against those of the model itself."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.model.conftest import build
from uninext_hf.processing_uninext import UninextProcessor
from uninext_hf.prompt_cache_uninext import PromptCache
from uninext_hf.prompt_uninext import Prompt

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
NAMES, SENTENCE = ["cat", "traffic light"], "the bird on the left of the bowl"
REFERENCE = Prompt.template(PICTURE, box=(10, 10, 40, 30))
TWO = Prompt.templates([REFERENCE, Prompt.template(PICTURE, box=(0, 0, 20, 20))])
MIXED = [NAMES, SENTENCE, REFERENCE, TWO]


@pytest.fixture(scope="module")
def processor():
    return UninextProcessor.for_model()


def assert_same(found, wanted):
    """Equal where anything looks: text is encoded at its own length here, and in a padded batch there."""
    assert type(found) is type(wanted)
    assert found.hidden.shape == wanted.hidden.shape
    for name in ("valid", "attend", "pool"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    used = wanted.valid | wanted.attend
    difference = (found.hidden - wanted.hidden)[used].abs().max()
    assert difference <= 1e-6 * max(1, wanted.hidden[used].abs().max())
    assert found.hidden[~used].eq(0).all()


@pytest.mark.parametrize(
    "prompts",
    [
        [NAMES],
        [SENTENCE],
        [REFERENCE],
        [TWO],
        [REFERENCE, TWO],  # a row with fewer references
        [NAMES, SENTENCE],  # different lengths
        [NAMES, REFERENCE],
        MIXED,
        [NAMES, NAMES],  # twice the same
    ],
)
def test_equal_to_the_model_and_from_memory_the_second_time(tiny, processor, prompts):
    cache, inputs = PromptCache(), processor(prompts=prompts, image_index=[0] * len(prompts))
    tensors = {key: value for key, value in inputs.items() if key != "image_index"}
    with torch.no_grad():
        wanted = tiny.get_prompt_features(**tensors)
    first = cache.features(tiny, inputs)
    assert_same(first, wanted)
    misses = cache.misses
    second = cache.features(tiny, inputs)
    assert cache.misses == misses == len(cache)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not second.hidden.requires_grad
    assert cache.num_bytes > 0


def test_parts_are_shared_and_values_do_not_depend_on_company(tiny, processor):
    cache = PromptCache()
    alone = cache.features(tiny, processor(prompts=[NAMES]))
    together = cache.features(tiny, processor(prompts=MIXED))
    assert (cache.hits, cache.misses) == (2, 4)  # NAMES, and the reference that two prompts have in common
    length = alone.hidden.shape[1]
    assert torch.equal(alone.hidden[0], together.hidden[0, :length])
    fresh = PromptCache().features(tiny, processor(prompts=[NAMES]))
    assert torch.equal(alone.hidden, fresh.hidden)


def test_same_detections_as_without_cache(tiny, processor):
    cache, inputs = PromptCache(), processor(images=[PICTURE], prompts=MIXED, size={"shortest_edge": 96})
    picture = {key: inputs[key] for key in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        wanted = tiny(**inputs)
        for _ in range(2):
            found = tiny(**picture, prompt_features=cache.features(tiny, inputs))
            torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-5, rtol=0)
    results = [processor.post_process_instances(out, inputs=inputs) for out in (found, wanted)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)
        assert torch.equal(a.labels, b.labels)


def test_other_text_other_picture_other_box_are_other_entries(tiny, processor):
    cache = PromptCache()
    other = PICTURE.copy()
    other[20, 20] ^= 255
    prompts = [
        ["cat"],
        ["cats"],
        "cat",  # the same tokens as the name: one entry
        Prompt.template(PICTURE, box=(10, 10, 40, 30)),
        Prompt.template(PICTURE.copy(), box=(10, 10, 40, 30)),  # the same content
        Prompt.template(PICTURE, box=(10, 10, 40, 31)),
        Prompt.template(other, box=(10, 10, 40, 30)),
    ]
    for prompt in prompts:
        cache.features(tiny, processor(prompts=[prompt]))
    assert (cache.hits, cache.misses) == (2, 5)
    cache.features(tiny, processor(prompts=[prompts[3]], size={"shortest_edge": 400}))
    assert cache.misses == 6


def test_bounds(tiny, processor):
    cache = PromptCache(max_entries=3)
    texts = [f"number {index}" for index in range(6)]
    for text in texts:
        cache.features(tiny, processor(prompts=[text]))
        cache.features(tiny, processor(prompts=[texts[0]]))  # used again and again, so it stays
        assert len(cache) <= 3
    assert cache.misses == 6
    one = PromptCache()
    one.features(tiny, processor(prompts=[REFERENCE]))
    size = one.num_bytes
    for limit, count in ((size - 1, 0), (size, 1), (2 * size, 2), (3 * size - 1, 2)):
        cache = PromptCache(max_bytes=limit)
        for x in range(4):
            prompt = Prompt.template(PICTURE, box=(x, 10, 40, 30))
            assert cache.features(tiny, processor(prompts=[prompt])).hidden.shape[1] == 1024
            assert cache.num_bytes <= limit
        assert len(cache) == count
    cache.clear()
    assert (len(cache), cache.num_bytes, cache.hits, cache.misses) == (0, 0, 0, 0)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_bytes": None}, {"max_entries": 0}, {"max_entries": True}])
def test_bad_bounds(limits):
    with pytest.raises(ValueError, match=f'"{next(iter(limits))}" must be a positive integer, got'):
        PromptCache(**limits)


def test_new_weights_are_noticed(processor):
    model, cache = build(), PromptCache()
    inputs = processor(prompts=MIXED)
    cache.features(model, inputs)
    before, misses = cache.weights_of(model), cache.misses
    with torch.no_grad():
        model.alignment_heads[0].bias.add_(1)  # reads prompts, does not encode them
    cache.features(model, inputs)
    assert cache.misses == misses
    with torch.no_grad():
        model.model.text_encoder.embeddings.word_embeddings.weight[29000].add_(1)  # a single word
    assert cache.weights_of(model) != before
    assert_same(cache.features(model, inputs), model.get_prompt_features(**inputs_of(inputs)))
    assert cache.misses == 2 * misses
    with torch.no_grad():
        model.model.text_encoder.embeddings.word_embeddings.weight[29000].sub_(1)
    model.load_state_dict(build().state_dict())
    assert cache.weights_of(model) == before
    model.bfloat16()
    assert cache.weights_of(model) != before
    assert cache.features(model, inputs).hidden.dtype == torch.bfloat16


def inputs_of(inputs):
    return {key: value for key, value in inputs.items() if key not in ("image_index", "pixel_values", "pixel_mask")}


def test_no_training_mode_and_no_empty_inputs(processor):
    model = build()
    with pytest.raises(ValueError, match='"inputs" must hold "input_ids" or "template_values", got neither'):
        PromptCache().features(model, {})
    with pytest.raises(ValueError, match='"model" must be in evaluation mode, got one in training mode'):
        PromptCache().features(model.train(), processor(prompts=[NAMES]))


def test_inference_mode_and_autocast(tiny, processor):
    cache, inputs = PromptCache(), processor(prompts=[SENTENCE])
    with torch.inference_mode():
        features = cache.features(tiny, inputs)
    assert not features.hidden.is_inference()  # usable in training later
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = cache.features(tiny, inputs)
        assert cache.misses == 2
        assert torch.equal(rounded.hidden, cache.features(tiny, inputs).hidden)
    assert torch.equal(cache.features(tiny, inputs).hidden, features.hidden)
    assert cache.misses == 2


LOADER = """
import sys, torch
import numpy as np
from uninext_hf import UninextForUniversalPerception, UninextProcessor
from uninext_hf.prompt_cache_uninext import PromptCache

folder = sys.argv[1]
model = UninextForUniversalPerception.from_pretrained(folder + "/model").eval()
cache = PromptCache()
assert cache.load(folder + "/prompts.safetensors", model) == 2
inputs = UninextProcessor.for_model()(prompts=[["cat", "traffic light"], "the bird on the left of the bowl"])
features = cache.features(model, inputs)
assert (cache.hits, cache.misses) == (2, 0)
torch.save(features.hidden, folder + "/hidden.pt")
"""


def test_saved_and_loaded_in_a_new_process(tmp_path, processor):
    model, cache = build(), PromptCache()
    model.save_pretrained(tmp_path / "model")
    inputs = processor(prompts=[NAMES, SENTENCE])
    features = cache.features(model, inputs)
    other = build(num_queries=3)
    with torch.no_grad():
        other.model.text_encoder.embeddings.word_embeddings.weight.mul_(2)
    cache.features(other, processor(prompts=[NAMES]))  # not written: other weights
    assert cache.save(tmp_path / "prompts.safetensors", model) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "prompts.safetensors"]
    run = subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "hidden.pt"), features.hidden)


def test_files_that_are_refused(tmp_path, tiny, processor):
    cache, path = PromptCache(), tmp_path / "prompts.safetensors"
    cache.features(tiny, processor(prompts=MIXED))
    cache.save(path, tiny)
    small = PromptCache(max_entries=2)
    assert small.load(path, tiny) == 4
    assert len(small) == 2
    other = build()
    with torch.no_grad():
        other.model.text_encoder.embeddings.word_embeddings.weight.mul_(2)
    with pytest.raises(ValueError, match=r'"path" must hold prompt features of this model\'s weights .* got those of'):
        PromptCache().load(path, other)
    with pytest.raises(FileNotFoundError, match='"path" must be a file of prompt features, got'):
        PromptCache().load(tmp_path / "nowhere", tiny)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match='"path" must be a complete safetensors file, got'):
        PromptCache().load(path, tiny)
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"path" must be a file that PromptCache\.save has written, got'):
        PromptCache().load(tmp_path / "model.safetensors", tiny)
    assert PromptCache().save(path, tiny) == 0  # nothing to write is no error
    assert PromptCache().load(path, tiny) == 0
