"""Compare with the official implementation and write what came out.

    python -m tests.parity.report            the reduced cases
    python -m tests.parity.report --full     the released shapes as well (minutes, up to 12 GB, needs ../shared)

Writes `docs/parity.json` (every value) and `docs/parity.md` (the table); a case that was not run keeps its entry.
"""

import argparse
import json
import platform
import re
import subprocess
import time
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from . import cases
from .conftest import Reference

DOCS = Path(__file__).resolve().parents[2] / "docs"
GROUPS = (
    ("backbone", r"(ref_)?backbone\."),
    ("projections", r"input_proj\."),
    ("text", r"text\."),
    ("template prompt", r"prompt\.0"),
    ("fusion", r"fusion\."),
    ("encoder", r"encoder\.|memory"),
    ("proposals", r"twostage\.(class|coord|reference)"),
    ("selection not in common", r"twostage\.topk"),
    ("decoder", r"decoder\."),
    ("class logits", r"layers\.logits|out\.pred_logits"),
    ("boxes (relative)", r"layers\.boxes|out\.pred_boxes|boxes_all|out\.mask_reference"),
    ("IoU logits", r"layers\.iou|out\.pred_iou"),
    ("mask parts", r"mask\."),
    ("mask logits", r"out\.mask_(mean|std|lowres)|best_mask"),
    ("embeddings", r"out\.reid"),
    ("scores", r"scores_all|final scores"),
    ("final boxes (pixels)", r"final boxes"),
    ("final masks (share of pixels)", r"final masks"),
)


def group_of(name: str) -> str | None:
    """Row of the table that a compared value belongs to."""
    plain = re.sub(r"^((\d+|frame\.\d+|final|image_model)\.)*", "", name)
    return next((group for group, pattern in GROUPS if re.match(pattern, plain)), None)


def table(results: dict[str, dict]) -> str:
    """Markdown: largest absolute difference per group and case."""
    names = [name for name in (*cases.REDUCED, *cases.FULL) if name in results]
    lines = ["| largest absolute difference | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for group, _ in GROUPS:
        cells = []
        for name in names:
            values = [value for key, value in results[name]["differences"].items() if group_of(key) == group]
            cells.append(f"{max(values):.1e}" if values else "")
        if any(cells):
            lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines.append("| values compared | " + " | ".join(str(len(results[name]["differences"])) for name in names) + " |")
    return "\n".join(lines)


PAGE = """# Parity with the official implementation

Written by `python -m tests.parity.report --full` from `docs/parity.json`; do not edit.

Every number is the largest absolute difference between a value of ours and the one recorded from the official PyTorch
code (float32, CPU) with the same synthetic weights and input; `tests/reference/README.md` says where those come from.
Bounds: rtol 1e-3 and atol 1e-4 for intermediate values, 1e-5 for scores, 0.01 pixels for final boxes, equal labels and
equal selected proposals, at most 0.1 % of the pixels of a mask. The official code differs from itself by up to 5e-6 in
the encoder, 9e-6 in class logits and 7e-5 in mask logits when another convolution library or thread count is used.

The full-size cases run in two parts: free up to the proposals, then with the recorded selection injected, because
neighbouring proposals are closer in score than float32 can tell.

{table}

{machine}
"""


def main() -> None:
    """Run, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also the released shapes")
    parser.add_argument("--only", help="just the cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = DOCS / "parity.json"
    results = json.loads(path.read_text())["cases"] if path.is_file() else {}
    names = [name for name in (*cases.REDUCED, *(cases.FULL if options.full else ())) if (options.only or "") in name]
    DOCS.mkdir(exist_ok=True)
    for name in tqdm(names, unit="case"):
        start = time.perf_counter()
        differences = cases.run(Reference, name)
        results[name] = {"seconds": round(time.perf_counter() - start, 1), "differences": differences}
        write(path, results, options.threads)


def write(path: Path, results: dict[str, dict], threads: int) -> None:
    """Result file and page, each complete or not at all."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": threads,
        "commit": commit.stdout.strip(),
    }
    page = PAGE.format(
        table=table(results),
        machine="Last run: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
    )
    for target, text in (
        (path, json.dumps({"machine": machine, "cases": results}, indent=1) + "\n"),
        (path.with_suffix(".md"), page),
    ):
        temporary = target.with_name(f".{target.name}")
        temporary.write_text(text)
        temporary.replace(target)


if __name__ == "__main__":
    main()
