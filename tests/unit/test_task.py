import dataclasses
import pickle

import pytest

from uninext_hf.task_uninext import TASKS, OutputKind, PromptKind, Task, TimeKind, get_task, infer_task

# The table of the architecture, written a second time on purpose.
EXPECTED = {
    "detection": ("categories", "box", "still"),
    "instance-segmentation": ("categories", "mask", "still"),
    "rec": ("expression", "box", "still"),
    "res": ("expression", "mask", "still"),
    "mot": ("categories", "box", "frames"),
    "mots": ("categories", "mask", "frames"),
    "vis": ("categories", "mask", "tracks"),
    "rvos": ("expression", "mask", "frames"),
    "sot": ("template", "box", "frames"),
    "vos": ("template", "mask", "frames"),
}


def test_the_ten_rows_in_order():
    assert {name: (task.prompt, task.output, task.time) for name, task in TASKS.items()} == EXPECTED
    assert list(TASKS) == list(EXPECTED)
    assert all(name == task.name and task.description for name, task in TASKS.items())


def test_rows_are_distinct():
    assert len({(task.prompt, task.output, task.time) for task in TASKS.values()}) == 10


def test_table_and_rows_are_immutable():
    with pytest.raises(TypeError):
        TASKS["detection"] = TASKS["rec"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["detection"].name = "other"


@pytest.mark.parametrize("kind", [*PromptKind, *OutputKind, *TimeKind])
def test_enums_are_strings(kind):
    assert kind == kind.value
    assert f"{kind}" == str(kind) == kind.value
    assert hash(kind) == hash(kind.value)
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_single_target():
    assert [kind.single_target for kind in PromptKind] == [False, True, True]


def test_get_task():
    assert get_task("rvos") == Task(
        "rvos", PromptKind.EXPRESSION, OutputKind.MASK, TimeKind.FRAMES, "referring video object segmentation"
    )


def test_get_task_lists_the_names():
    with pytest.raises(ValueError, match=r'"name" must be one of detection, .*, vos, got \'segmentation\''):
        get_task("segmentation")


@pytest.mark.parametrize(
    ("prompt", "output", "name"),
    [
        ("categories", "box", "detection"),
        ("categories", "mask", "instance-segmentation"),
        ("expression", "box", "rec"),
        (PromptKind.EXPRESSION, OutputKind.MASK, "res"),
        ("template", "box", "sot"),
        ("template", "mask", "vos"),
    ],
)
def test_infer_task(prompt, output, name):
    assert infer_task(prompt, output) is TASKS[name]


def test_infer_task_wants_masks_if_not_told():
    assert infer_task("categories").name == "instance-segmentation"


@pytest.mark.parametrize(("prompt", "output"), [("point", "mask"), ("categories", "keypoints"), ("", "box")])
def test_infer_task_errors(prompt, output):
    with pytest.raises(ValueError, match=r'"prompt_kind" must be one of categories, expression, template'):
        infer_task(prompt, output)
