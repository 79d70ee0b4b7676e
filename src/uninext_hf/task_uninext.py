"""The ten tasks as a table of prompt kind, output kind and time kind.

Source: UNINEXT (https://arxiv.org/abs/2303.06674), whose ten instance perception tasks these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class PromptKind(StrEnum):
    """What tells the model which objects to look for. Compares equal to its plain string value."""

    CATEGORIES = "categories"
    EXPRESSION = "expression"
    TEMPLATE = "template"

    @property
    def single_target(self) -> bool:
        """Whether the prompt means exactly one object: True for an expression or a template."""
        return self is not PromptKind.CATEGORIES


class OutputKind(StrEnum):
    """What is returned for each object, next to its score. Compares equal to its plain string value."""

    BOX = "box"
    MASK = "mask"


class TimeKind(StrEnum):
    """How results relate to time. Compares equal to its plain string value.

    `STILL`: one picture, no identities. `FRAMES`: a result per video frame, identities carried on.
    `TRACKS`: as `FRAMES`, then one label and one score for each whole track.
    """

    STILL = "still"
    FRAMES = "frames"
    TRACKS = "tracks"


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    Args:
        name: the short name used in recipes, on the command line and in `TASKS`.
        prompt: kind of prompt.
        output: boxes, or masks as well.
        time: still picture, frame by frame, or whole tracks.
        description: one line for people.
    """

    name: str
    prompt: PromptKind
    output: OutputKind
    time: TimeKind
    description: str = ""


_CATEGORIES, _EXPRESSION, _TEMPLATE = PromptKind
_BOX, _MASK = OutputKind
_STILL, _FRAMES, _TRACKS = TimeKind

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("detection", _CATEGORIES, _BOX, _STILL, "object detection"),
            Task("instance-segmentation", _CATEGORIES, _MASK, _STILL, "instance segmentation"),
            Task("rec", _EXPRESSION, _BOX, _STILL, "referring expression comprehension"),
            Task("res", _EXPRESSION, _MASK, _STILL, "referring expression segmentation"),
            Task("mot", _CATEGORIES, _BOX, _FRAMES, "multiple object tracking"),
            Task("mots", _CATEGORIES, _MASK, _FRAMES, "multiple object tracking and segmentation"),
            Task("vis", _CATEGORIES, _MASK, _TRACKS, "video instance segmentation"),
            Task("rvos", _EXPRESSION, _MASK, _FRAMES, "referring video object segmentation"),
            Task("sot", _TEMPLATE, _BOX, _FRAMES, "single object tracking"),
            Task("vos", _TEMPLATE, _MASK, _FRAMES, "video object segmentation"),
        )
    }
)
"""Task name -> `Task`, read-only, in the order in which the tasks are always listed (still pictures first)."""


def get_task(name: str) -> Task:
    """The task of a name.

    Args:
        name: a key of `TASKS`.

    Returns:
        The row of the table.

    Raises:
        ValueError: there is no such task; the message lists the names.
    """
    if name not in TASKS:
        raise ValueError(f'"name" must be one of {", ".join(TASKS)}, got {name!r}.')
    return TASKS[name]


def infer_task(prompt_kind: PromptKind | str, output: OutputKind | str = OutputKind.MASK) -> Task:
    """The task meant by a prompt on a single picture.

    It is the first row of `TASKS` with this prompt and output. That is the still-picture row for categories and
    expressions. Templates have no still-picture row, so a template on a still picture gives the frame-by-frame row
    (`sot` or `vos`): the picture is treated as a video of one frame.

    Args:
        prompt_kind: a `PromptKind` or its value.
        output: an `OutputKind` or its value.

    Returns:
        The row of the table.

    Raises:
        ValueError: `prompt_kind` or `output` is not one of the known values.
    """
    for task in TASKS.values():
        if task.prompt == prompt_kind and task.output == output:
            return task
    raise ValueError(
        f'"prompt_kind" must be one of {", ".join(PromptKind)} and "output" one of {", ".join(OutputKind)}, '
        f"got {prompt_kind!r} and {output!r}."
    )


__all__ = ["TASKS", "OutputKind", "PromptKind", "Task", "TimeKind", "get_task", "infer_task"]
