"""Print the commands of one fenced bash block of README.md: `readme_block.py ci:test`.

A block is named by the HTML comment on the line before it, so that CI runs the very lines a reader sees.
"""

import argparse
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def find_block(text: str, name: str) -> str:
    """Return the lines between the fences that follow `<!-- name -->`.

    Args:
        text: a Markdown document.
        name: the content of the comment, for example `ci:test`.

    Raises:
        ValueError: the comment is absent or not unique, or no closed, non-empty bash block follows it.
    """
    marker = f"<!-- {name} -->"
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if line.strip() == marker]
    if len(places) != 1:
        raise ValueError(f'expected exactly one line "{marker}", found {len(places)}.')
    rest = lines[places[0] + 1 :]
    while rest and not rest[0].strip():
        rest.pop(0)
    if not rest or rest[0].strip() != "```bash":
        raise ValueError(f'expected a line "```bash" right after "{marker}".')
    fences = [number for number, line in enumerate(rest) if line.strip() == "```"]
    if not fences:
        raise ValueError(f'the block after "{marker}" is not closed.')
    block = "\n".join(rest[1 : fences[0]]).strip()
    if not block:
        raise ValueError(f'the block after "{marker}" is empty.')
    return block


def main() -> int:
    """Print the block, or say in one sentence on stderr what is wrong and return 1."""
    parser = argparse.ArgumentParser(description="Print one named bash block of a Markdown file.")
    parser.add_argument("name", help="content of the comment before the block, for example ci:test")
    parser.add_argument("--file", type=Path, default=README, help="the Markdown file (default: README.md)")
    arguments = parser.parse_args()
    try:
        print(find_block(arguments.file.read_text(encoding="utf-8"), arguments.name))
    except FileNotFoundError:
        print(f"{arguments.file.name} does not exist.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{arguments.file.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
