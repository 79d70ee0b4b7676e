"""Official checkpoints in and out: total maps, bit-equal round trips, damaged files refused."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from uninext_hf.configuration_uninext import UninextConfig
from uninext_hf.conversion import ConversionError, load_official, to_official, verify_official
from uninext_hf.conversion.key_map import drop_reason
from uninext_hf.conversion.official import infer_config

from .conftest import FOLDER

PRESET_OF = {
    "video_joint_r50": "r50",
    "video_joint_convnext_large": "convnext-large",
    "video_joint_vit_huge": "vit-huge",
    "image_joint_r50": "r50-image",
    "image_joint_convnext_large": "convnext-large-image",
    "image_joint_vit_huge": "vit-huge-image",
    "tiny_video_r50": "reference-tiny-video",
    "tiny_image_r50": "reference-tiny-image",
}
STEM = "detr.detr.ref_backbone.0.backbone.stem.conv1.weight"


def meta_state(manifest: str, optional: bool = True) -> dict[str, torch.Tensor]:
    entries = json.loads((FOLDER / "manifests" / f"{manifest}.json").read_text())["tensors"]
    return {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in entries.items()
        if optional or not entry.get("optional")
    }


def plain(config: UninextConfig) -> dict:
    """Fields of a configuration without what loading notes in it."""
    fields = config.to_dict()
    for part in (fields, fields["backbone_config"], fields["text_config"]):
        for noise in ("dtype", "_name_or_path", "transformers_version", "architectures"):
            part.pop(noise, None)
    return fields


@pytest.mark.parametrize("manifest", PRESET_OF)
def test_every_key_is_mapped_or_dropped_with_a_reason(manifest):
    state = meta_state(manifest)
    report = verify_official(state)
    assert report.ok, report.problem()
    assert len(report.mapped) + len(report.dropped) == len(state)
    assert all(reason for _, reason in report.dropped)
    model = load_official(state)
    assert plain(model.config) == plain(UninextConfig.from_preset(PRESET_OF[manifest]))
    filled = {key for _, ours, _, _ in report.mapped for key in ours}
    assert filled == set(model.state_dict())
    # Back: the same keys and shapes. The position ids are the only ones left out.
    back = to_official(model)
    assert set(state) - set(back) == {"text_encoder.body.model.embeddings.position_ids"}
    assert set(back) <= set(state)
    assert all(back[key].shape == state[key].shape for key in back)
    assert report.template_channels == (4 if "video" in manifest else 0)
    assert report.stage.startswith("video" if "video" in manifest else "image")


@pytest.fixture(scope="module")
def video_state(reference):
    return reference.weights("tiny_video_r50", optional=True)


@pytest.fixture(scope="module")
def image_state(reference):
    return reference.weights("tiny_image_r50", optional=True)


def test_round_trip_is_bit_equal(reference, video_state):
    back = to_official(reference.tiny("tiny_video_r50"))
    for key, tensor in back.items():
        reason = drop_reason(key)
        if reason is None or "second name" in reason:
            assert torch.equal(tensor, video_state[key]), key
    # Documented values of the dropped ones: a layer that outputs zero, a counter at zero.
    resizer = "detr.detr.transformer.resizer"
    assert not back[f"{resizer}.fc.weight"].any()
    assert not back[f"{resizer}.fc.bias"].any()
    assert (back[f"{resizer}.layer_norm.weight"] == 1).all()
    assert not back[f"{resizer}.layer_norm.bias"].any()
    assert torch.equal(back["criterion._iter"], torch.zeros(1))
    assert back["detr.detr.class_embed.0.bias0"] is back["detr.detr.transformer.decoder.class_embed.0.bias0"]


def test_tensors_are_assigned_not_copied(video_state):
    model = load_official(video_state)
    ours, theirs = model.state_dict()["model.level_embed"], video_state["detr.detr.transformer.level_embed"]
    assert ours.data_ptr() == theirs.data_ptr()
    assert not model.training


@pytest.mark.parametrize("form", ["wrapped.pth", "bare.pth", "legacy.pth", "tensors.safetensors"])
def test_file_forms(tmp_path, image_state, form):
    path = tmp_path / form
    if form.endswith("safetensors"):
        save_file({key: tensor.clone().contiguous() for key, tensor in image_state.items()}, path)
    else:
        content = {"model": image_state, "iteration": 7} if form == "wrapped.pth" else image_state
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy.pth")
    model = load_official(path)
    assert torch.equal(model.model.level_embed, image_state["detr.detr.transformer.level_embed"])
    assert model.config.frozen_stages == 2
    assert not any(p.requires_grad for p in model.model.image_encoder.backbone.embedder.parameters())
    assert not any(p.requires_grad for p in model.model.image_encoder.backbone.encoder.stages[0].parameters())
    assert all(p.requires_grad for p in model.model.image_encoder.backbone.encoder.stages[1].parameters())


def test_stage_2_becomes_the_start_of_stage_3(image_state, tmp_path):
    model = load_official(image_state, as_video=True)
    model.save_pretrained(tmp_path)  # refuses tensors that share memory
    assert len(verify_official(image_state, as_video=True).fresh) > 50
    assert model.config.use_template_encoder
    assert model.config.num_reid_layers == 2
    assert model.config.frozen_stages == 0
    stem = model.model.template_encoder.image_encoder.backbone.embedder.embedder.convolution.weight
    source = image_state["detr.detr.backbone.0.backbone.stem.conv1.weight"]
    assert torch.equal(stem[:, :3], source)
    assert not stem[:, 3].any()
    for parameter in (*model.reid_head.parameters(), *model.model.template_encoder.fuser.parameters()):
        assert torch.isfinite(parameter).all()
    assert model.reid_head.layers[0].self_attn.q_proj.weight.std() > 0.01
    # The file the official script writes has the copied backbone, with 4 channels, and nothing else new.
    prefix = "detr.detr.backbone.0.backbone."
    script = {**image_state}
    for key in image_state:
        if key.startswith(prefix):
            tensor = image_state[key]
            if key.endswith("stem.conv1.weight"):
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:, :1])], dim=1)
            script[key.replace("backbone.0", "ref_backbone.0", 1)] = tensor
    report = verify_official(script)
    assert report.ok
    assert report.fresh
    again = load_official(script)
    assert torch.equal(again.model.template_encoder.image_encoder.backbone.embedder.embedder.convolution.weight, stem)


def test_three_channel_template_branch_is_completed(video_state):
    state = {**video_state, STEM: video_state[STEM][:, :3]}
    model = load_official(state)
    stem = model.model.template_encoder.image_encoder.backbone.embedder.embedder.convolution.weight
    assert torch.equal(stem[:, :3], video_state[STEM][:, :3])
    assert not stem[:, 3].any()
    assert verify_official(state).template_channels == 3


def test_given_configuration_overrides_what_cannot_be_seen(image_state):
    config = infer_config(image_state)
    config.text_config.num_attention_heads = 6
    assert load_official(image_state, config).config.text_config.num_attention_heads == 6


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


def damaged_states(state):
    """Name -> (a damaged copy of the state dict, what the message must name)."""
    level, head = "detr.detr.transformer.level_embed", "detr.detr.class_embed.0.bias_lang"
    convolution, word = "detr.mask_head.lay1.weight", "text_encoder.body.model.embeddings.word_embeddings.weight"
    nan = state[head].clone()
    nan[3] = torch.nan
    yield "missing key", without(state, "detr.controller.layers.1.bias"), "detr.controller.layers.1.bias"
    yield "missing essential key", without(state, level), level
    yield "missing backbone", {k: v for k, v in state.items() if ".backbone.0." not in k}, "backbone"
    yield "missing text encoder", {k: v for k, v in state.items() if not k.startswith("text_")}, "text_encoder"
    yield "missing layer", {k: v for k, v in state.items() if "encoder.layers.0" not in k}, "encoder.layers.0"
    yield "unknown key", {**state, "detr.new_head.weight": torch.zeros(1)}, "detr.new_head.weight"
    yield "wrong shape", {**state, convolution: state[convolution][:, :-1]}, convolution
    yield (
        "transposed",
        {**state, "detr.resizer.fc.weight": state["detr.resizer.fc.weight"].T},
        "detr.resizer.fc.weight",
    )
    yield "not a number", {**state, head: nan}, head
    yield "integers", {**state, head: state[head].int()}, head
    yield (
        "second name differs",
        {
            **state,
            "detr.detr.transformer.decoder.bbox_embed.0.layers.0.bias": state["detr.controller.layers.0.bias"],
        },
        "detr.detr.transformer.decoder.bbox_embed.0.layers.0.bias",
    )
    yield "scalar instead of table", {**state, word: torch.zeros(())}, word
    yield (
        "two backbones in one",
        {
            **state,
            "detr.detr.backbone.0.backbone.pos_embed": torch.zeros(1),
            "detr.detr.backbone.0.backbone.patch_embed.proj.weight": torch.zeros(1),
        },
        "backbone",
    )
    yield "another model", {"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, "level_embed"
    yield "already ours", {"model.image_encoder.x": torch.zeros(1)}, "from_pretrained"
    yield "not tensors", {**state, "note": "hello"}, "note"
    yield "empty", {}, "empty"
    yield "odd widths", {**state, level: torch.zeros(4, 255)}, "255"


NAMES = [
    "missing key",
    "missing essential key",
    "missing backbone",
    "missing text encoder",
    "missing layer",
    "unknown key",
    "wrong shape",
    "transposed",
    "not a number",
    "integers",
    "second name differs",
    "scalar instead of table",
    "two backbones in one",
    "another model",
    "already ours",
    "not tensors",
    "empty",
    "odd widths",
]


def assert_one_sentence(message: str, *names: str) -> None:
    assert "\n" not in message
    assert len(message) < 800, message
    assert message.endswith("."), message
    for name in names:
        assert name in message, message


@pytest.mark.parametrize("name", NAMES)
def test_damaged_contents_are_refused(image_state, name):
    found = {label: (state, fragment) for label, state, fragment in damaged_states(image_state)}
    assert list(found) == NAMES
    state, fragment = found[name]
    with pytest.raises(ConversionError) as error:
        load_official(copy.copy(state))
    assert_one_sentence(str(error.value), fragment)


def damaged_files(folder, state):
    small = {key: state[key] for key in list(state)[:30]}
    whole = folder / "whole.pth"
    torch.save({"model": small}, whole)
    content = whole.read_bytes()
    files = {
        "half.pth": content[: len(content) // 2],
        "header.pth": content[:100],
        "empty.pth": b"",
        "text.pth": b"this is not a checkpoint\n" * 10,
        "picture.pth": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "flipped.pth": content[:30] + bytes(40) + content[70:],
        "zeroed.pth": content[: len(content) // 2] + bytes(1000) + content[len(content) // 2 + 1000 :],
        "text.safetensors": b"not safetensors",
        "empty.safetensors": b"",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    save_file({key: tensor.clone() for key, tensor in small.items()}, folder / "cut.safetensors")
    data = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) - 1000])
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"model": {"a": re.compile("x")}}, folder / "objects.pth")
    torch.save({"model": 3, "epoch": 4}, folder / "numbers.pth")
    return [*files, "cut.safetensors", "list.pth", "objects.pth", "numbers.pth"]


def test_damaged_files_are_refused(tmp_path, image_state):
    names = damaged_files(tmp_path, image_state)
    assert len(names) + len(NAMES) >= 20
    for name in names:
        with pytest.raises(ConversionError) as error:
            load_official(tmp_path / name)
        assert_one_sentence(str(error.value), name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_official(tmp_path / "nowhere.pth")
