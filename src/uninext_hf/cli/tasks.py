"""Print the ten tasks: what prompts them, what comes out, and over what time."""

import argparse

EXAMPLES = "example:\n  uninext tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from ..task_uninext import TASKS

    rows = [("task", "prompt", "output", "time", "what")]
    rows += [
        (task.name, task.prompt.value, task.output.value, task.time.value, task.description) for task in TASKS.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
