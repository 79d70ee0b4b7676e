"""The `uninext` command: one file per sub-command, each turning arguments into calls of the public API.

argparse rather than a larger library: it is part of Python, so that the core's dependencies stay as they are.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "perceive": "find instances in pictures: annotated PNG and JSON",
    "tasks": "print the table of tasks",
    "convert": "turn an official checkpoint into a folder that from_pretrained reads",
    "verify": "check an official checkpoint key by key, writing nothing",
    "bench": "time and memory per stage on this machine",
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples keep their lines, defaults are shown."""


def build_parser(commands: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Parser with the given sub-commands; only their modules are imported."""
    from .. import __version__

    parser = argparse.ArgumentParser(prog="uninext", description="Find instances in pictures and video by any prompt.")
    parser.add_argument("--version", action="version", version=f"uninext_hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands:
        module = import_module(f".{name}", __name__)
        subparser = subparsers.add_parser(
            name, help=COMMANDS[name], description=module.__doc__, epilog=module.EXAMPLES, formatter_class=_Help
        )
        subparser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, else 1 with one line on the error stream."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else tuple(COMMANDS)
    options = build_parser(known).parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("uninext: stopped; what was finished stays", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if options.debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"uninext {options.command}: {reason}", file=sys.stderr)
        return 1
    return 0
