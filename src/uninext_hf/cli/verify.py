"""Check an official checkpoint key by key: stage, backbone, where every tensor goes or why it is dropped."""

import argparse

EXAMPLES = "example:\n  uninext verify video_joint_r50.pth\n  uninext verify video_joint_r50.pth --summary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and how much to print."""
    parser.add_argument("checkpoint", help="official .pth or .safetensors file")
    parser.add_argument("--summary", action="store_true", help="print stage, backbone and counts only")


def run(options: argparse.Namespace) -> None:
    """Print the report; a file that does not fit is an error."""
    from ..conversion import ConversionError, verify_official

    report = verify_official(options.checkpoint)
    lines = report.lines()
    print("\n".join([*lines[:3], lines[-1]] if options.summary else lines))
    if not report.ok:
        raise ConversionError(report.problem())
