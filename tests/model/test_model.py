"""Sizes, precision, saving, gradients, compilation: what a Transformers model is expected to do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, RobertaConfig

import uninext_hf.modeling_uninext as modeling
from uninext_hf import (
    PRESETS,
    UninextConfig,
    UninextForUniversalPerception,
    UninextModel,
    deformable_attention_uninext,
)
from uninext_hf.modeling_uninext import UninextFrozenBatchNorm2d, UninextImageEncoder

from .conftest import build, spread

FIELDS = ("logits", "pred_boxes", "pred_ious", "mask_kernels", "mask_features", "query_embeddings")


def same(a, b, **tolerances):
    for name in FIELDS:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# Configuration


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_hold_no_unknown_key(preset, tmp_path):
    fields = set(UninextConfig.__dataclass_fields__)
    assert set(PRESETS[preset]) <= fields
    config = UninextConfig.from_preset(preset)
    for part in ("backbone_config", "text_config"):
        given = PRESETS[preset].get(part, {})
        built = getattr(config, part).to_dict()
        assert all(built[key] == value for key, value in given.items()), part
    config.save_pretrained(tmp_path)
    assert UninextConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with torch.device("meta"):
        UninextForUniversalPerception(config)


def test_default_is_the_r50_video_model():
    assert UninextConfig().to_dict() == UninextConfig.from_preset("r50").to_dict()


def test_tiny_is_tiny():
    assert sum(parameter.numel() for parameter in build().parameters()) < 1_000_000


def test_every_field_is_read_and_documented():
    source = "".join(Path(module.__file__).read_text() for module in (modeling, deformable_attention_uninext))
    inherited = {"tie_word_embeddings", "is_encoder_decoder"}
    own = [name for name in UninextConfig.__annotations__ if name not in inherited]
    for name in own:
        assert re.search(rf"config\.{name}\b", source), f"{name} is read nowhere"
        assert f"        {name} (" in UninextConfig.__doc__, f"{name} is not documented"


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"d_model": 250}, '"d_model" must be a multiple of 4'),
        ({"d_model": 36, "encoder_attention_heads": 8}, '"d_model" must be a multiple of "encoder_attention_heads"'),
        ({"fusion_dim": 30}, '"fusion_dim" must be a multiple of "fusion_attention_heads"'),
        ({"num_feature_levels": 2}, '"num_feature_levels" must be at least 3'),
        ({"dropout": 1.5}, '"dropout" must be in'),
        ({"class_prior": 0.0}, '"class_prior" must be in'),
        ({"decoder_layers": 0}, '"decoder_layers" must be at least 1'),
        ({"frozen_stages": -1}, '"frozen_stages" must not be negative'),
        ({"num_queries": "many"}, "num_queries"),
    ],
)
def test_bad_configurations_are_refused(fields, fragment):
    with pytest.raises(Exception, match=re.escape(fragment)):
        UninextConfig.from_preset("tiny", **fields)
    with pytest.raises(ValueError, match=r'"name" must be one of r50'):
        UninextConfig.from_preset("r51")


OTHER = {
    "one layer each": {"encoder_layers": 1, "decoder_layers": 1},
    "three layers each": {"encoder_layers": 3, "decoder_layers": 3, "num_reid_layers": 2},
    "another width": {"d_model": 48, "fusion_dim": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 2},
    "five levels": {"num_feature_levels": 5},
    "three levels": {"num_feature_levels": 3},
    "wider mask head": {"mask_feature_dim": 4, "mask_head_layers": 2},
    "image model": {"use_template_encoder": False, "num_reid_layers": 0, "frozen_stages": 2},
    "grid_sample": {"msda_implementation": "grid_sample"},
    "convnext": {
        "backbone_config": {
            "model_type": "convnext",
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "out_indices": [2, 3, 4],
        }
    },
    "plain vision transformer": {
        "backbone_config": {
            "model_type": "vitdet",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "pretrain_image_size": 32,
            "use_relative_position_embeddings": True,
            "window_size": 2,
            "window_block_indices": [0],
            "out_indices": [2],
        }
    },
    "swin": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "out_indices": [2, 3, 4],
        }
    },
    "distilbert": {"text_config": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32)},
    "roberta": {
        "text_config": RobertaConfig(
            vocab_size=30522, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    },
}


@pytest.mark.parametrize("overrides", OTHER.values(), ids=OTHER)
def test_other_shapes_run_and_train(overrides, text):
    model = build(**overrides)
    pixels = torch.randn(2, 3, 64, 96)
    outputs = model(pixels, **text, output_masks=True)
    queries = min(20, model.config.num_queries)
    assert outputs.logits.shape == (2, queries, 9)
    assert outputs.pred_masks.shape == (2, queries, 16, 24)
    assert (outputs.query_embeddings is None) == (model.config.num_reid_layers == 0)
    assert torch.isfinite(outputs.pred_boxes).all()
    outputs.pred_masks.sum().backward()
    assert torch.isfinite(model.model.level_embed.grad).all()
    if model.config.use_template_encoder:
        assert model(pixels, template_values=torch.randn(2, 4, 64, 64)).logits.shape == (2, queries, 64)
    else:
        with pytest.raises(ValueError, match=r'"template_values" need a model with "use_template_encoder=True"'):
            model(pixels, template_values=torch.randn(2, 4, 64, 64))


def test_timm_backbone(text):
    pytest.importorskip("timm")
    config = {
        "model_type": "timm_backbone",
        "backbone": "resnet10t",
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [2, 3, 4],
    }
    model = build(backbone_config=config)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not norms
    assert model(torch.randn(2, 3, 64, 96), **text).logits.shape == (2, 20, 9)
    assert model(torch.randn(2, 3, 64, 96), template_values=torch.randn(2, 4, 64, 64)).logits.shape == (2, 20, 64)


def test_a_backbone_at_the_wrong_stride_is_named(text):
    config = {**PRESETS["tiny"]["backbone_config"], "out_indices": [1, 2, 3]}
    with pytest.raises(ValueError, match=r'"backbone_config" must give its first map at stride 8'):
        build(backbone_config=config)(torch.randn(2, 3, 64, 96), **text)
    with pytest.raises(ValueError, match='"frozen_stages" must be 0 for a'):
        build(frozen_stages=9)


# Frozen parts


def test_batch_norms_are_frozen_buffers(tiny, pictures, text):
    model = build()
    norms = [module for module in model.modules() if isinstance(module, UninextFrozenBatchNorm2d)]
    assert norms
    assert not any("normalization" in name for name, _ in model.named_parameters())
    assert not any("num_batches_tracked" in name for name in model.state_dict())
    for norm in norms:
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        evaluated = model(pictures, **text)
    model.train()
    model.config.text_config.hidden_dropout_prob = 0.0
    model.model.fusion.dropout = 0.0
    trained = model(pictures, **text)
    trained.logits.sum().backward()
    same(trained, evaluated, atol=1e-4, rtol=1e-4)  # the training form of the norm equals the other
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# Precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pictures, text, templates, dtype):
    reference = build()
    model = build().to(dtype)
    for kind in (text, templates):
        try:
            outputs = model(pictures, **kind, output_masks=True)
        except RuntimeError as error:
            if "not implemented for 'Half'" in str(error):
                pytest.skip(f"this torch has no such op: {error}")
            raise
        expected = reference(pictures, **kind)
        assert outputs.mask_kernels.dtype == dtype
        for name in ("logits", "pred_boxes", "pred_ious", "reference_points", "pred_masks"):
            assert outputs[name].dtype == torch.float32, name
            assert torch.isfinite(outputs[name]).all(), name
        # Same proposals injected, else near ties swap ranks.
        again = model(pictures, **kind, proposal_indices=expected.proposal_indices)
        assert (again.pred_boxes - expected.pred_boxes).abs().mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bfloat16 module", "autocast"])
def test_locations_and_boxes_stay_float32(pictures, text, mode, monkeypatch):
    seen = []

    def spy(value, shapes, locations, weights):
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return deformable_attention_uninext.deformable_attention_gather(value, shapes, locations, weights)

    monkeypatch.setitem(deformable_attention_uninext._IMPLEMENTATIONS, "gather", spy)
    model = build()
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(pictures, **text, output_masks=True)
    else:
        outputs = model.to(torch.bfloat16)(pictures, **text, output_masks=True)
    assert len(seen) == 1 + 2 + 1
    assert {locations for _, locations, _ in seen} == {weights for *_, weights in seen} == {torch.float32}
    assert {value for value, *_ in seen} == {torch.bfloat16}
    assert outputs.pred_boxes.dtype == outputs.pred_masks.dtype == torch.float32
    # Box coordinates are finer than bfloat16 can hold.
    assert (outputs.pred_boxes != outputs.pred_boxes.bfloat16().float()).any()


@torch.no_grad()
def test_mask_coordinates_survive_autocast():
    """Relative coordinates of 1,200 pixels in bfloat16 would be off by pixels."""
    from uninext_hf.mask_head_uninext import dynamic_mask_logits

    arguments = (torch.randn(3, 169) * 0.1, torch.rand(8, 20, 150), torch.rand(3, 2) * 1200)
    expected = dynamic_mask_logits(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        actual = dynamic_mask_logits(*arguments)
    assert torch.equal(actual, expected)


# Gradients, checkpointing, compilation


def gradients(model, pictures, text, templates):
    model.zero_grad()
    for kind in (text, templates):
        outputs = model(pictures, **kind, output_masks=True)
        (outputs.logits.clamp(min=-100).mean() + outputs.pred_boxes.mean() + outputs.pred_masks.mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_equals_plain(pictures, text, templates, reentrant):
    model = build(fusion_dropout=0.0).train()
    expected = gradients(model, pictures, text, templates)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    actual = gradients(model, pictures, text, templates)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    unused = {name for name, _ in model.named_parameters()} - set(expected)
    # Embeddings and IoU scores were not in this sum, and earlier layers' heads and label noise serve the losses.
    allowed = ("reid_head", "iou_heads", "alignment_heads.0", "denoising_label_projection")
    assert all(name.startswith(allowed) or "proposals.class_head" in name for name in unused), sorted(unused)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "templates"])
def test_compiles_without_graph_breaks(pictures, kind, request):
    model, prompt = build(), request.getfixturevalue(kind)
    expected = model(pictures, **prompt, output_masks=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual = compiled(pictures, **prompt, output_masks=True)
    same(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_eager_attention_equals_sdpa(pictures, text):
    model = build()
    assert model.config._attn_implementation == "sdpa"
    assert model.model.text_encoder.config._attn_implementation == "sdpa"
    expected = model(pictures, **text)
    model.set_attn_implementation("eager")
    eager = model(pictures, **text, output_attentions=True, output_hidden_states=True)
    same(eager, expected, atol=1e-5, rtol=1e-4)
    assert [a.shape for a in eager.decoder_attentions] == [(2, 4, 20, 20)] * 2
    assert [a.shape[2:] for a in eager.encoder_attentions] == [(4, 4, 2)]
    assert len(eager.encoder_hidden_states) == 2
    assert len(eager.decoder_hidden_states) == 3
    assert torch.equal(eager.encoder_hidden_states[-1], eager.encoder_last_hidden_state)


@torch.no_grad()
def test_tuple_output(tiny, pictures, text):
    output = tiny(pictures, **text)
    values = tiny(pictures, **text, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.logits)
    assert len(values) == len(output.to_tuple())


# Saving and loading


def test_save_and_load_in_a_new_process(tmp_path, pictures, text):
    model = build()
    with torch.no_grad():
        expected = {name: model(pictures, **text)[name] for name in FIELDS}
        base = model.model(pictures, **text).last_hidden_state
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": {"pixel_values": pictures, **text}, "expected": expected, "base": base}, tmp_path / "io.pt")
    script = """
import sys, json, torch
from transformers import AutoModel, AutoModelForZeroShotObjectDetection
import uninext_hf
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))  # sums are split over threads: another number, another rounding
io = torch.load(folder + "/io.pt")
report = {}
for auto in (AutoModel, AutoModelForZeroShotObjectDetection):
    model, info = auto.from_pretrained(folder + "/model", output_loading_info=True)
    with torch.no_grad():
        output = model(**io["inputs"])
    if auto is AutoModel:
        equal = torch.equal(output.last_hidden_state, io["base"])
    else:
        equal = all(torch.equal(output[name], value) for name, value in io["expected"].items())
    missing = sorted(info["missing_keys"])
    report[type(model).__name__] = [equal, missing, sorted(info["mismatched_keys"])]
print(json.dumps(report))
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == {
        "UninextModel": [True, [], []],
        "UninextForUniversalPerception": [True, [], []],
    }


@torch.no_grad()
def test_sharded_files_and_device_map(tmp_path, pictures, text):
    pytest.importorskip("accelerate")
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
        loaded, info = UninextForUniversalPerception.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        same(loaded.eval()(pictures, **text), model(pictures, **text), atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_device_map_with_disk_offload(tmp_path, pictures, text):
    """Parts on different devices: whatever crosses from one to another must be moved, not assumed."""
    pytest.importorskip("accelerate")
    model = build()
    model.save_pretrained(tmp_path / "model")
    device_map = {
        **{f"model.{name}": "cpu" for name, _ in model.model.named_children()},
        **{name: "cpu" for name, _ in model.named_children() if name != "model"},
        "model.level_embed": "cpu",
        "model.query_embed": "cpu",
        "model.encoder": "disk",
        "model.text_encoder": "disk",
        "reid_head": "disk",
    }
    loaded = UninextForUniversalPerception.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    same(loaded(pictures, **text), model(pictures, **text), atol=0, rtol=0)


def test_frozen_stages_survive_loading(tmp_path):
    model = build(use_template_encoder=False, num_reid_layers=0, frozen_stages=2)
    model.save_pretrained(tmp_path)
    for loaded in (
        model,
        UninextForUniversalPerception.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
    ):
        backbone = next(module for module in loaded.modules() if isinstance(module, UninextImageEncoder)).backbone
        flags = [p.requires_grad for p in (*backbone.embedder.parameters(), *backbone.encoder.stages[0].parameters())]
        assert flags
        assert not any(flags)
        assert all(parameter.requires_grad for parameter in backbone.encoder.stages[1].parameters())


def test_missing_weights_are_initialised(tmp_path):
    model = build()
    state = {
        key: value for key, value in model.state_dict().items() if "reid_head" not in key and ".layer.0." not in key
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = UninextForUniversalPerception.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    assert loaded.reid_head.layers[0].self_attn.q_proj.weight.std() > 0.01
    norms = [module for module in loaded.modules() if isinstance(module, UninextFrozenBatchNorm2d)]
    assert any(torch.equal(norm.running_var, torch.ones_like(norm.running_var)) for norm in norms)
    assert torch.equal(loaded.model.level_embed, model.model.level_embed)


# Initialisation


def official_statistics(folder):
    entries = json.loads((folder / "manifests" / "tiny_video_r50.json").read_text())["tensors"]
    entries = {key: entries[entry["of"]] if entry.get("kind") == "alias" else entry for key, entry in entries.items()}
    return {key: (e["init_mean"], e["init_std"]) for key, e in entries.items() if "init_std" in e}


@pytest.mark.parametrize("how", ["constructed", "on meta, then initialised"])
def test_initialisation_as_official(how, request):
    """Mean and spread of every tensor of ours equal those of the freshly initialised official model."""
    from uninext_hf.conversion.key_map import Reshape, entries

    folder = request.path.parents[1] / "reference"
    torch.manual_seed(0)
    config = UninextConfig.from_preset("reference-tiny-video")
    if how == "constructed":
        model = UninextForUniversalPerception(config)
    else:
        model = UninextForUniversalPerception.from_pretrained(None, config=config, state_dict={})
    state, statistics = model.state_dict(), official_statistics(folder)
    compared = 0
    for entry in entries(config):
        mean, std = statistics[entry.official]
        if "backbone" in entry.official or entry.official.startswith("text_encoder"):
            continue  # transformers' own models with their own rules
        values = torch.cat([state[name].flatten() for name in entry.ours])
        error = max(std, 0.02) * 5 / max(len(values), 1) ** 0.5 + 1e-6
        assert abs(float(values.mean()) - mean) < error + 0.15 * std, (entry.official, float(values.mean()), mean)
        if std == 0:
            assert len(values) == 1 or float(values.std()) < 1e-6, entry.official
        elif len(values) >= 128:
            assert float(values.std()) == pytest.approx(std, rel=0.15), (entry.official, float(values.std()), std)
        compared += 1
    assert compared > 200
    assert Reshape.SPLIT in {entry.reshape for entry in entries(config)}


def test_sampling_offsets_point_in_eight_directions(request):
    model = UninextForUniversalPerception(UninextConfig.from_preset("reference-tiny-video"))
    offsets = model.model.encoder.layers[0].self_attn.sampling_offsets.bias.view(8, 4, 4, 2)
    assert torch.equal(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(offsets[1, 2, 1], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(offsets[4, 3, 3], torch.tensor([-4.0, 0.0]), atol=1e-6, rtol=0)


def test_text_encoder_without_pooler():
    model = UninextModel(
        UninextConfig.from_preset(
            "tiny",
            text_config=BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        )
    )
    assert model.text_encoder.pooler is None
    assert model.get_input_embeddings() is model.text_encoder.embeddings.word_embeddings
    spread(model)
