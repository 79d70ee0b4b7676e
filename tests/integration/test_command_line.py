"""The `uninext` command as a user meets it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from uninext_hf import Instances, UninextConfig, UninextForUniversalPerception, UninextProcessor
from uninext_hf.cli import COMMANDS, main
from uninext_hf.conversion import to_official

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "examples" / "images" / "cat_and_budgie.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with saved random weights."""
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("model")
    config = UninextConfig.from_preset("tiny")
    UninextForUniversalPerception(config).save_pretrained(target)
    UninextProcessor.for_model(config).save_pretrained(target)
    return target


def perceive(*arguments: str | Path) -> int:
    return main(["perceive", *map(str, arguments)])


def test_first_light_of_the_readme(tmp_path):
    """The perceive part of the README's first block, in a process of its own."""
    reader = [sys.executable, ROOT / ".ci" / "readme_block.py", "ci:first-light"]
    block = subprocess.run(reader, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(block.split("&&")[-1])
    assert program.endswith("uninext")
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "uninext_hf", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "random weights" in run.stderr
    record = json.loads((tmp_path / "cat_and_budgie.json").read_text())
    assert record["warning"].startswith("random weights")
    assert record["phrases"] == ["cat", "bird", "bowl"]
    assert record["instances"]
    assert all(0 <= row["label"] < 3 and row["mask"]["size"] == [480, 640] for row in record["instances"])
    drawn, photo = Image.open(tmp_path / "cat_and_budgie.png"), Image.open(PHOTO)
    assert drawn.size == photo.size
    assert drawn.getpixel((2, 2)) != photo.getpixel((2, 2))  # the strip that says "random weights"
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@pytest.mark.parametrize(
    ("prompt", "task", "count"),
    [
        (["--names", "cat, bird"], "instance-segmentation", 5),
        (["--expression", "the green bird"], "res", 1),
        (["--box", "409,161,496,269"], "vos", 1),
        (["--box", "409,161,496,269", "--reference", PHOTO, "--task", "sot"], "sot", 1),
        (["--names", "cat", "--task", "detection"], "detection", 5),
    ],
)
def test_prompts_and_tasks(folder, tmp_path, prompt, task, count):
    code = perceive(PHOTO, *prompt, "--model", folder, "--out", tmp_path, "--threshold", 0, "--top-k", count)
    assert code == 0
    record = json.loads((tmp_path / "cat_and_budgie.json").read_text())
    assert record["task"] == task
    assert len(record["instances"]) == count
    assert record["warning"] is None
    assert ("mask" in record["instances"][0]) == (task not in ("detection", "sot"))


def test_mask_prompt(folder, tmp_path):
    mask = Image.new("L", (640, 480))
    mask.paste(255, (409, 161, 496, 269))
    mask.save(tmp_path / "mask.png")
    assert perceive(PHOTO, "--mask", tmp_path / "mask.png", "--model", folder, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "cat_and_budgie.png").is_file()


def test_folders_globs_equal_names_and_resume(folder, tmp_path, capsys):
    for name in ("a/one.png", "a/two.png", "b/one.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), "red").save(path)
    out = tmp_path / "out"
    arguments = [tmp_path / "a", f"{tmp_path}/b/*.png", "--names", "cat", "--model", folder, "--out", out]
    assert perceive(*arguments) == 0
    assert sorted(path.name for path in out.glob("*.json")) == ["one-2.json", "one.json", "two.json"]
    (out / "two.json").unlink()
    before = (out / "one.json").stat().st_mtime_ns
    capsys.readouterr()
    assert perceive(*arguments, "--resume") == 0
    assert "two.png" in capsys.readouterr().out
    assert (out / "two.json").is_file()
    assert (out / "one.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["nowhere.jpg", "--names", "cat", "--model", "preset:tiny"], '"images" must name pictures'),
        ([PHOTO, "--model", "preset:tiny"], "Exactly one of --names"),
        ([PHOTO, "--names", "cat", "--expression", "dog", "--model", "preset:tiny"], "Exactly one of --names"),
        ([PHOTO, "--names", ",", "--model", "preset:tiny"], "names"),
        ([PHOTO, "--names", "cat", "--model", "preset:large"], '"--model preset:NAME" must name one of r50'),
        ([PHOTO, "--names", "cat", "--model", "/no/such/folder"], "/no/such/folder"),
        ([PHOTO, "--names", "cat", "--model", "preset:tiny", "--task", "rec"], '"--task rec" needs a prompt'),
        ([PHOTO, "--names", "cat", "--model", "preset:tiny", "--task", "sing"], "sing"),
        ([PHOTO, "--box", "1,2,3", "--model", "preset:tiny"], '"--box" must be four numbers'),
        ([PHOTO, "--box", "50,2,3,90", "--model", "preset:tiny"], "x1 > x0"),
        ([PHOTO, "--mask", "nowhere.png", "--model", "preset:tiny"], "nowhere.png"),
        ([PHOTO, "--names", "cat", "--reference", PHOTO, "--model", "preset:tiny"], '"--reference" goes with'),
        ([PHOTO, "--names", "cat", "--model", "preset:tiny", "--threads", "0"], '"--threads" must be at least 1'),
        ([ROOT / "README.md", "--names", "cat", "--model", "preset:tiny"], "README.md"),
    ],
)
def test_errors_are_one_sentence(arguments, fragment, tmp_path, capsys):
    assert perceive(*arguments, "--out", tmp_path) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("uninext perceive: ")
    assert fragment in error
    assert not list(tmp_path.iterdir())


def test_help_and_tasks(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "example" in capsys.readouterr().out
    assert main(["tasks"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 11
    with pytest.raises(SystemExit):
        main(["fly"])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A small checkpoint in the official layout, with a ResNet of bottleneck blocks."""
    torch.manual_seed(0)
    config = UninextConfig.from_preset(
        "tiny",
        d_model=64,
        fusion_dim=64,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        fusion_attention_heads=8,
        text_config={
            "model_type": "bert",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 32,
        },
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "out_indices": [2, 3, 4],
        },
    )
    path = tmp_path_factory.mktemp("official") / "model_final.pth"
    state = {key: tensor.clone() for key, tensor in to_official(UninextForUniversalPerception(config)).items()}
    torch.save({"model": state, "iteration": 1}, path)
    return path


def test_verify_convert_perceive(official, tmp_path, capsys):
    """The way of the README from an official file."""
    assert main(["verify", str(official)]) == 0
    report = capsys.readouterr().out
    assert "video model (stage 3)" in report
    assert "0 missing, 0 unknown" in report
    target = tmp_path / "uninext"
    assert main(["convert", str(official), str(target)]) == 0
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= names
    assert "model_final.pth" in (target / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["uninext"]
    out = tmp_path / "out"
    assert perceive(PHOTO, "--names", "cat, bird", "--model", target, "--out", out, "--threshold", 0) == 0
    assert (out / "cat_and_budgie.png").is_file()
    # An existing folder is not overwritten by accident.
    assert main(["convert", str(official), str(target)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(official), str(target), "--overwrite"]) == 0


def test_a_failed_conversion_leaves_nothing(tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, bad)
    for command in (["verify", str(bad)], ["convert", str(bad), str(tmp_path / "out")]):
        assert main(command) == 1
        assert "official UNINEXT checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_reported_masks_are_those_of_the_model(folder, tmp_path):
    """What the JSON holds is what post-processing returned."""
    mask_api = pytest.importorskip("pycocotools.mask")
    assert perceive(PHOTO, "--names", "cat", "--model", folder, "--out", tmp_path, "--threshold", 0, "--top-k", 3) == 0
    record = json.loads((tmp_path / "cat_and_budgie.json").read_text())
    model = UninextForUniversalPerception.from_pretrained(folder).eval()
    processor = UninextProcessor.from_pretrained(folder)
    inputs = processor(images=str(PHOTO), prompts=["cat"])
    with torch.inference_mode():
        outputs = model(**inputs)
    found: Instances = processor.post_process_instances(outputs, inputs=inputs, target_sizes=[(480, 640)], top_k=3)[0]
    for row, mask, score in zip(record["instances"], found.masks, found.scores, strict=True):
        assert (torch.as_tensor(mask_api.decode(row["mask"])).bool() == mask).all()
        assert row["score"] == pytest.approx(float(score), abs=1e-5)
