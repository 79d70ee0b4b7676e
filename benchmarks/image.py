"""Cost of one picture: ours against transformers' Grounding DINO of the same size, as ratios within one run.

Both have a ResNet-50, six encoder and six decoder layers, 900 queries and BERT-base; random weights, the same random
picture and the same number of prompt tokens. Ours does more: masks and re-identification embeddings are included.

Times are CPU seconds of one process in which the candidates take turns (median of the rounds). Peak memory is the
resident maximum of one child process per candidate, model included.

    python benchmarks/image.py --json result.json            all sizes (about ten minutes on one thread)
    python benchmarks/image.py --quick --json result.json    one small size
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((480, 640), (800, 1333))
TOKENS = (16, 194)
CANDIDATES = ("grounding_dino", "fp32", "bf16")


def build(candidate: str):
    """A model in evaluation mode with random weights."""
    import torch

    torch.manual_seed(0)
    if candidate == "grounding_dino":
        from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, ResNetConfig

        config = GroundingDinoConfig(backbone_config=ResNetConfig(out_indices=[2, 3, 4]), num_queries=900)
        return GroundingDinoForObjectDetection(config).eval()
    from uninext_hf import UninextConfig, UninextForUniversalPerception

    model = UninextForUniversalPerception(UninextConfig.from_preset("r50")).eval()
    return model.to(torch.bfloat16) if candidate == "bf16" else model


def inputs_of(size: tuple[int, int], tokens: int) -> dict:
    """One random picture and one random prompt that starts and ends as BERT's do."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2000, 20000, (1, tokens), generator=generator)
    ids[0, 0], ids[0, -1] = 101, 102
    return {
        "pixel_values": torch.randn(1, 3, *size, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def run(candidate: str, model, inputs: dict):
    """One forward pass."""
    import torch

    with torch.inference_mode():
        if candidate == "grounding_dino":
            return model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]))
        return model(**inputs)


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16; without, torch's convolutions take a hundred times as long."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def measure_times(sizes, tokens, rounds: int, threads: int, candidates: tuple[str, ...]) -> list[dict]:
    """Interleaved rounds in this process."""
    import torch
    from tqdm.auto import tqdm

    from uninext_hf.cli.bench import StageTimes

    torch.set_num_threads(threads)
    models = {candidate: build(candidate) for candidate in candidates}
    watched = {name: StageTimes(model).cpu for name, model in models.items() if name != "grounding_dino"}
    rows = []
    for size in sizes:
        for count in tokens:
            inputs, seconds = inputs_of(size, count), {candidate: [] for candidate in candidates}
            for round_number in tqdm(range(rounds + 1), desc=f"{size[0]}x{size[1]}, {count} tokens", unit="round"):
                for candidate, model in models.items():
                    start = time.process_time()
                    run(candidate, model, inputs)
                    if round_number:  # the first one warms up
                        seconds[candidate].append(time.process_time() - start)
            for candidate, values in seconds.items():
                rows.append(
                    {
                        "name": f"{candidate} {size[0]}x{size[1]} {count} tokens",
                        "candidate": candidate,
                        "size": list(size),
                        "tokens": count,
                        "seconds_median": statistics.median(values),
                        "seconds_min": min(values),
                        # The first round warmed up.
                        "stages": {
                            name: statistics.median(times[1:]) for name, times in watched.get(candidate, {}).items()
                        },
                    }
                )
                watched.get(candidate, {}).clear()
    return rows


def measure_memory(rows: list[dict], threads: int) -> None:
    """Peak resident memory in MB of one child process per row."""
    for row in rows:
        arguments = [row["candidate"], *map(str, row["size"]), str(row["tokens"]), str(threads)]
        child = subprocess.run(
            [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=True
        )
        row["peak_mb"] = float(child.stdout.strip().splitlines()[-1])


def child(candidate: str, height: str, width: str, tokens: str, threads: str) -> None:
    """Body of a child process: one forward pass, then the peak."""
    import torch

    torch.set_num_threads(int(threads))
    run(candidate, build(candidate), inputs_of((int(height), int(width)), int(tokens)))
    # Not getrusage: its maximum is carried over from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """Ours over Grounding DINO in float32; below 1 means ours is cheaper. Without a number of tokens: 16."""
    found = {}
    for row in rows:
        if row["candidate"] == "grounding_dino":
            continue
        base = next(
            other
            for other in rows
            if other["candidate"] == "grounding_dino"
            and (other["size"], other["tokens"]) == (row["size"], row["tokens"])
        )
        label = f"image_{row['size'][0]}x{row['size'][1]}_{row['candidate']}"
        label += "" if row["tokens"] == TOKENS[0] else f"_{row['tokens']}_tokens"
        found[f"{label}_vs_grounding_dino_time"] = row["seconds_median"] / base["seconds_median"]
        if "peak_mb" in row:
            found[f"{label}_vs_grounding_dino_memory"] = row["peak_mb"] / base["peak_mb"]
    return found


def machine(threads: int) -> dict:
    """What the numbers belong to."""
    import torch
    import transformers

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16": native_bf16(),
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write(target: Path, result: dict) -> None:
    """The result file, complete or not at all."""
    temporary = target.with_name(f".{target.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, one prompt, three rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="skip the child processes")
    parser.add_argument("--bf16", action="store_true", help="also where the processor has no bfloat16 arithmetic")
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    options = parser.parse_args()
    sizes, tokens = (SIZES[:1], TOKENS[:1]) if options.quick else (SIZES, TOKENS)
    result = {"machine": machine(options.threads)}
    candidates = CANDIDATES if options.bf16 or native_bf16() else CANDIDATES[:2]
    if len(candidates) < len(CANDIDATES):
        print("bf16 is left out: this processor has no bfloat16 arithmetic (--bf16 measures it all the same)")
    rows = measure_times(sizes, tokens, 3 if options.quick else options.rounds, options.threads, candidates)
    if not options.no_memory:
        measure_memory(rows, options.threads)
    result |= {"rows": rows, "ratios": ratios_of(rows)}
    for row in rows:
        shares = "  ".join(f"{name} {value:.2f}" for name, value in row["stages"].items())
        print(f"{row['name']:34s} {row['seconds_median']:7.2f} s  {row.get('peak_mb', 0):7.0f} MB  {shares}")
    for name, value in result["ratios"].items():
        print(f"{name:60s} {value:.3f}")
    if options.json:
        write(Path(options.json), result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
