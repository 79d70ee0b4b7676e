"""Find instances in pictures: for each picture an annotated PNG and a JSON file with boxes, scores and masks (RLE)."""

import argparse
import glob
import json
import sys
from pathlib import Path

from .atomic import new_file

EXAMPLES = """examples:
  uninext perceive street.jpg --names "person, bicycle, traffic light" --model uninext-r50/
  uninext perceive street.jpg --expression "the woman with the red umbrella" --model uninext-r50/
  uninext perceive later.jpg --reference first.jpg --box 409,161,496,269 --model uninext-r50/
  uninext perceive photos/ --names "cat, remote" --model preset:tiny --out results/

--model preset:NAME has random weights, so its boxes are meaningless; it shows that everything is in place."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pictures, prompt, model and output."""
    parser.add_argument("images", nargs="+", help="pictures, folders of pictures, or quoted globs")
    prompt = parser.add_argument_group("prompt (one of)")
    prompt.add_argument("--names", help="category names, separated by commas")
    prompt.add_argument("--names-file", help="text file with one category name per line")
    prompt.add_argument("--expression", help="a description of one object")
    prompt.add_argument("--box", metavar="X0,Y0,X1,Y1", help="the target in the reference picture, pixels")
    prompt.add_argument("--mask", metavar="FILE", help="the target in the reference picture, non-zero pixels")
    parser.add_argument("--reference", help="picture that --box or --mask refer to; default: each picture itself")
    parser.add_argument("--task", help="a name from `uninext tasks`; default: masks for the given prompt")
    parser.add_argument("--model", required=True, help="folder, Hub repository, or preset:NAME (random weights)")
    parser.add_argument("--out", default="perceived", help="folder for the results")
    parser.add_argument("--threshold", type=float, help="lowest score; default 0.3, or 0 with random weights")
    parser.add_argument("--top-k", type=int, help="most instances per picture; default 100 for names, else 1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--resume", action="store_true", help="skip pictures whose JSON is there already")


def run(options: argparse.Namespace) -> None:
    """Process the pictures one after the other; finished ones stay when a later one fails."""
    pictures = find_pictures(options.images)
    request = prompt_of(options)  # before the model is loaded: a bad prompt should not cost a minute
    import torch
    from tqdm.auto import tqdm

    from ..task_uninext import get_task, infer_task
    from . import model_source

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f'"--threads" must be at least 1, got {options.threads}.')
        torch.set_num_threads(options.threads)
    task = infer_task(request.kind) if options.task is None else get_task(options.task)
    if task.prompt != request.kind:
        raise ValueError(f'"--task {task.name}" needs a prompt of kind {task.prompt.value}, got {request.kind}.')
    model, processor, warning = model_source.load(options.model, options.dtype)
    if warning:
        print(warning, file=sys.stderr)
    threshold = options.threshold if options.threshold is not None else 0.0 if warning else 0.3
    top_k = options.top_k if options.top_k is not None else 10 if warning and not task.prompt.single_target else None
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    names = output_names(pictures)
    for picture in tqdm(pictures, desc="perceive", unit="picture", disable=len(pictures) == 1):
        record = out / f"{names[picture]}.json"
        if options.resume and record.is_file():
            continue
        prompt = request.for_picture(picture)
        inputs = processor(images=str(picture), prompts=prompt)
        with torch.inference_mode():
            outputs = model(**inputs)
        image = load(picture)
        results = processor.post_process_instances(
            outputs,
            inputs=inputs,
            target_sizes=[image.size[::-1]],
            output=task.output.value,
            threshold=threshold,
            top_k=top_k,
        )
        content = {
            "picture": picture.name,
            "task": task.name,
            "prompt": prompt.describe(),
            "model": options.model,
            "warning": warning,
            "threshold": threshold,
            **results[0].to_json(),
        }
        with new_file(out / f"{names[picture]}.png") as path:
            results[0].draw(image, color_by="label", banner=warning).save(path, format="PNG")
        with new_file(record) as path:
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        found = f"{len(results[0])} instance{'' if len(results[0]) == 1 else 's'}"
        tqdm.write(f"{picture}: {found} -> {out / names[picture]}.png, .json")


class Request:
    """The prompt of the command line; a box or mask without reference belongs to each picture anew."""

    def __init__(self, options: argparse.Namespace):
        given = [name for name in ("names", "names_file", "expression", "box", "mask") if getattr(options, name)]
        if len(given) != 1:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            raise ValueError(
                f"Exactly one of --names, --names-file, --expression, --box and --mask is needed, got {flags}."
            )
        self.options, self.source = options, given[0]
        self.kind = {"names": "categories", "names_file": "categories", "expression": "expression"}.get(
            given[0], "template"
        )
        if options.reference and self.kind != "template":
            raise ValueError(f'"--reference" goes with --box or --mask, got --{given[0].replace("_", "-")}.')
        self.box = parse_box(options.box) if options.box else None
        if self.kind != "template":
            self.for_picture(Path())

    def for_picture(self, picture: Path):
        """The prompt for one picture."""
        from ..prompt_uninext import Prompt

        options = self.options
        if self.source == "names":
            return Prompt.categories([name.strip() for name in options.names.split(",") if name.strip()])
        if self.source == "names_file":
            lines = Path(options.names_file).read_text(encoding="utf-8").splitlines()
            return Prompt.categories([line.strip() for line in lines if line.strip()])
        if self.source == "expression":
            return Prompt.expression(options.expression)
        reference = options.reference or str(picture)
        if self.box is not None:
            return Prompt.template(reference, box=self.box)
        from PIL import Image

        with Image.open(options.mask) as mask:
            return Prompt.template(reference, mask=mask.copy())


def prompt_of(options: argparse.Namespace) -> Request:
    """The prompt that the arguments name.

    Raises:
        ValueError: none or several are given, or it is malformed.
    """
    return Request(options)


def parse_box(text: str) -> tuple[float, ...]:
    """`X0,Y0,X1,Y1` -> numbers."""
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4:
        raise ValueError(f'"--box" must be four numbers X0,Y0,X1,Y1 in pixels, got {text!r}.')
    return box


def find_pictures(patterns: list[str]) -> list[Path]:
    """Pictures named by files, folders and globs, in order, none twice.

    Raises:
        FileNotFoundError: a name matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        if not matches:
            raise FileNotFoundError(f'"images" must name pictures, a folder of pictures or a glob, got {pattern!r}.')
        found.update(dict.fromkeys(matches))
    return list(found)


def output_names(pictures: list[Path]) -> dict[Path, str]:
    """A file name for each picture: its own without suffix, numbered where two would be the same."""
    names: dict[Path, str] = {}
    used: set[str] = set()
    for picture in pictures:
        name, number = picture.stem, 2
        while name in used:
            name, number = f"{picture.stem}-{number}", number + 1
        used.add(name)
        names[picture] = name
    return names


def load(picture: Path):
    """The picture as PIL, as people see it: the processor's own reading, EXIF rotation included."""
    from PIL import Image

    from ..image_processing_uninext import load_picture

    return Image.fromarray(load_picture(picture).permute(1, 2, 0).numpy())
