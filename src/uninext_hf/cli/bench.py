"""Time and memory of each stage for one picture, on this machine, with your model, size, dtype and threads."""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

from .atomic import new_file

EXAMPLES = """examples:
  uninext bench --model preset:r50 --size 800x1333 --threads 1
  uninext bench --model uninext-r50/ --picture street.jpg --names "person, car" --json bench.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, picture and what to measure with."""
    parser.add_argument("--model", required=True, help="folder, Hub repository, or preset:NAME (random weights)")
    parser.add_argument("--picture", help="picture to use; default: a grey one of --size")
    parser.add_argument("--size", default="800x1333", metavar="HxW", help="network input, pixels")
    parser.add_argument("--names", default="person, bicycle, car", help="category names, separated by commas")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=3, help="passes after one to warm up")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")


def stage_modules(model) -> dict:
    """Modules whose time is shown on its own, in the order they run."""
    trunk = model.model
    stages = {
        "backbone": trunk.image_encoder,
        "projections": trunk.input_projections,
        "text": trunk.text_encoder,
        "fusion": trunk.fusion,
        "encoder": trunk.encoder,
        "proposals": trunk.proposals,
        "decoder": trunk.decoder,
        "mask features": model.mask_branch,
        "embeddings": model.reid_head,
    }
    return {name: module for name, module in stages.items() if module is not None}


class StageTimes:
    """CPU seconds (all threads together) and wall seconds per stage, filled by hooks at every forward pass."""

    def __init__(self, model):
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}
        for name, module in stage_modules(model).items():
            begun: list[tuple[float, float]] = []
            module.register_forward_pre_hook(lambda *_, begun=begun: begun.append(_clocks()))
            module.register_forward_hook(lambda *_, name=name, begun=begun: self.add(name, begun.pop()))

    def add(self, name: str, begun: tuple[float, float]) -> None:
        """Note one run of a stage that began at these clock readings."""
        cpu, wall = _clocks()
        self.cpu.setdefault(name, []).append(cpu - begun[0])
        self.wall.setdefault(name, []).append(wall - begun[1])

    def clear(self) -> None:
        """Forget what was measured."""
        self.cpu.clear()
        self.wall.clear()


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, and write the JSON."""
    import torch
    import transformers
    from PIL import Image
    from tqdm.auto import tqdm

    from . import model_source
    from .perceive import load

    height, width = parse_size(options.size)
    names = [name.strip() for name in options.names.split(",") if name.strip()]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.rounds < 1:
        raise ValueError(f'"--rounds" must be at least 1, got {options.rounds}.')
    picture = Image.new("RGB", (width, height), "grey") if options.picture is None else load(Path(options.picture))
    model, processor, warning = model_source.load(options.model, options.dtype)
    times = StageTimes(model)
    for index in tqdm(range(options.rounds + 1), desc="bench", unit="pass"):
        if index == 1:
            times.clear()  # the first pass warmed up
        begun = _clocks()
        inputs = processor(images=picture, prompts=names, size={"height": height, "width": width})
        times.add("preprocessing", begun)
        with torch.inference_mode():
            begun = _clocks()
            outputs = model(**inputs)
            times.add("network", begun)
            begun = _clocks()
            processor.post_process_instances(outputs, inputs=inputs, target_sizes=[picture.size[::-1]])
            times.add("post-processing with masks", begun)
    order = ["preprocessing", *stage_modules(model), "network", "post-processing with masks"]
    rows = [
        {
            "name": name,
            "cpu_milliseconds": 1000 * statistics.median(times.cpu[name]),
            "wall_milliseconds": 1000 * statistics.median(times.wall[name]),
        }
        for name in order
        if name in times.cpu
    ]
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": options.model,
        "dtype": options.dtype,
        "size": [height, width],
        "tokens": int(inputs["input_ids"].shape[1]),
        "msda": model.config.msda_implementation,
        "rows": rows,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20),
    }
    print(f"{'stage':28s} {'CPU ms':>10s} {'wall ms':>10s}")
    for row in rows:
        print(f"{row['name']:28s} {row['cpu_milliseconds']:10.1f} {row['wall_milliseconds']:10.1f}")
    print(f"{height}x{width}, {result['tokens']} tokens, {options.dtype}, {result['machine']['threads']} threads")
    print(f"peak resident memory of this process: {result['peak_mb']:.0f} MB")
    if warning:
        print(warning)
    if options.json:
        with new_file(Path(options.json)) as path:
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def parse_size(text: str) -> tuple[int, int]:
    """`800x1333` -> height and width.

    Raises:
        ValueError: it is no such pair of positive numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'"--size" must be HEIGHTxWIDTH in pixels, for example 800x1333, got {text!r}.')
    return int(parts[0]), int(parts[1])
