"""Write `docs/benchmarks.md` from the result files in `benchmarks/results`.

python benchmarks/report.py
"""

import json
from pathlib import Path

from image import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = """# Benchmarks

Written by `python benchmarks/report.py` from `benchmarks/results/*.json`; do not edit. Every ratio is a quotient of
two medians of the same run; seconds are CPU seconds and belong to the machine named below them, so compare ratios
only. Random weights: speed does not depend on them.
"""


def section(name: str, result: dict) -> str:
    """One result file as a table of ratios and one of rows."""
    machine = result["machine"]
    lines = [f"## {name}", "", f"`python benchmarks/{name}.py --json benchmarks/results/{name}.json`", ""]
    lines += ["| ratio | value |", "|---|---|"]
    lines += [f"| {key} | {value:.2f} |" for key, value in result["ratios"].items()]
    lines += ["", "| row | median CPU seconds | peak MB | stages (seconds) |", "|---|---|---|---|"]
    for row in result["rows"]:
        peak = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in row.get("stages", {}).items())
        lines.append(f"| {row['name']} | {row['seconds_median']:.4g} | {peak} | {stages} |")
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items())
    bf16 = "" if machine["bf16"] else " It has no bfloat16 arithmetic, so bfloat16 is not measured."
    lines += [
        "",
        f"{machine['cpu']}, {machine['threads']} thread(s), load {machine['load']:.1f}, {versions}.{bf16}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    files = sorted(RESULTS.glob("*.json"))
    page = "\n".join([PAGE, *(section(path.stem, json.loads(path.read_text())) for path in files)])
    target = ROOT / "docs" / "benchmarks.md"
    temporary = target.with_name(f".{target.name}")
    temporary.write_text(page)
    temporary.replace(target)
    print(f"wrote {Path('docs') / target.name} from {len(files)} result files")


if __name__ == "__main__":
    main()
