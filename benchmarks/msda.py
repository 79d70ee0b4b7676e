"""Speed of the deformable-attention paths against `grid_sample` in float32, as ratios within one run.

Shapes of an 800x1333 picture: all 22,350 encoder positions, or 900 decoder queries. Offsets are normal with 2 pixels
around the real grid for the encoder, 4 pixels around random points for the decoder. CPU seconds of this process;
candidates take turns. A memory copy of 128 MB is timed beside them, to show how busy the machine is.

    python benchmarks/msda.py --json result.json
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from uninext_hf.deformable_attention_uninext import available_implementations, implementation

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
QUICK_SHAPES = ((50, 84), (25, 42), (13, 21), (7, 11))
HEADS, DIM, POINTS = 8, 32, 4


def problem(kind: str, shapes) -> tuple[torch.Tensor, ...]:
    """Values, locations and weights of one call."""
    generator = torch.Generator().manual_seed(0)
    length = sum(height * width for height, width in shapes)
    if kind == "encoder":
        grids = []
        for height, width in shapes:
            ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            grids.append(torch.stack([xs / width, ys / height], dim=-1).flatten(0, 1))
        centres, pixels = torch.cat(grids), 2.0
    else:
        centres, pixels = torch.rand(900, 2, generator=generator), 4.0
    offsets = torch.randn(1, len(centres), HEADS, len(shapes), POINTS, 2, generator=generator) * pixels
    sizes = torch.tensor([[width, height] for height, width in shapes])[:, None]
    locations = centres[None, :, None, None, None] + offsets / sizes
    weights = torch.rand(1, len(centres), HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    value = torch.randn(1, length, HEADS, DIM, generator=generator)
    return value, locations, weights.view(1, len(centres), HEADS, len(shapes), POINTS)


def forward(function, shapes, tensors) -> None:
    """One call without gradient."""
    with torch.inference_mode():
        function(tensors[0], shapes, *tensors[1:])


def forward_backward(function, shapes, tensors) -> None:
    """One call and the gradients of all three inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    function(leaves[0], shapes, *leaves[1:]).sum().backward()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the positions, three rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    options = parser.parse_args()
    from image import machine, write

    torch.set_num_threads(options.threads)
    shapes, rounds = (QUICK_SHAPES, 3) if options.quick else (SHAPES, options.rounds)
    names = available_implementations()
    calls = {
        (kind, run.__name__, name): (run, implementation(name), problem(kind, shapes))
        for kind in ("encoder", "decoder")
        for run in (forward, forward_backward)
        for name in names
    }
    seconds: dict[tuple[str, ...], list[float]] = {key: [] for key in calls} | {("copy of 128 MB",): []}
    block = torch.zeros(2**25)
    for index in tqdm(range(rounds + 1), unit="round"):
        for key, (run, function, tensors) in calls.items():
            start = time.process_time()
            run(function, shapes, tensors)
            if index:  # the first round warms up
                seconds[key].append(time.process_time() - start)
        start = time.process_time()
        block.clone()
        if index:
            seconds[("copy of 128 MB",)].append(time.process_time() - start)
    rows = [
        {"name": " ".join(key), "seconds_median": statistics.median(values), "seconds_min": min(values)}
        for key, values in seconds.items()
    ]
    medians = {row["name"]: row["seconds_median"] for row in rows}
    ratios = {
        f"msda_{kind}_{run}_fp32_{name}_speedup": medians[f"{kind} {run} grid_sample"]
        / medians[f"{kind} {run} {name}"]
        for kind, run, name in calls
        if name != "grid_sample"
    }
    for row in rows:
        print(f"{row['name']:40s} {row['seconds_median']:8.4f} s")
    for name, value in ratios.items():
        print(f"{name:56s} {value:6.1f}")
    if options.json:
        write(Path(options.json), {"machine": machine(options.threads), "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
