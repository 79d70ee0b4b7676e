"""Turn an official checkpoint into a folder with safetensors, configuration, processor and a model card."""

import argparse
import hashlib
import sys
from pathlib import Path

from .atomic import new_folder

EXAMPLES = """examples:
  uninext convert video_joint_r50.pth uninext-r50/
  uninext convert image_joint_r50.pth start-of-stage-3/ --video
  uninext convert video_joint_r50.pth uninext-r50/ --push_to my-name/uninext-r50"""

CARD = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
tags: [uninext, universal-instance-perception]
---

# UNINEXT, {stage}, {backbone} backbone

Converted by uninext_hf {version} from `{name}` (sha256 `{digest}`): {mapped} tensors mapped, {dropped} dropped with a
reason, {fresh} initialised anew. The weights are those of that file; this card says nothing about how good they are.

```python
import uninext_hf
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

model = AutoModelForZeroShotObjectDetection.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```

Architecture: Yan et al., "Universal Instance Perception as Object Discovery and Retrieval", CVPR 2023; official
implementation MasterBin-IIAU/UNINEXT (MIT). Mind the terms of whoever trained the checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target and options."""
    parser.add_argument("checkpoint", help="official .pth or .safetensors file")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--video", action="store_true", help="make an image model (stage 2) the start of a video model (stage 3)"
    )
    parser.add_argument("--push_to", metavar="ORG/NAME", help="also upload the folder to this Hub repository")


def run(options: argparse.Namespace) -> None:
    """Convert; the folder appears only when it is complete."""
    from transformers.utils import logging

    from .. import UninextProcessor, __version__
    from ..conversion import load_official, verify_official

    source, folder = Path(options.checkpoint), Path(options.folder)
    with new_folder(folder, options.overwrite) as target:
        report = verify_official(source, as_video=options.video)
        model = load_official(source, as_video=options.video)
        print(f"writing {folder}", file=sys.stderr)
        model.save_pretrained(target)
        UninextProcessor.for_model(model.config).save_pretrained(target)
        card = CARD.format(
            stage=report.stage,
            backbone=report.backbone,
            version=__version__,
            name=source.name,
            digest=_digest(source),
            mapped=len(report.mapped),
            dropped=len(report.dropped),
            fresh=len(report.fresh),
            folder=options.push_to or folder.name,
        )
        (target / "README.md").write_text(card, encoding="utf-8")
    logging.get_logger(__name__).info("converted")
    print("\n".join([*report.lines()[:3], report.lines()[-1], f"wrote     {folder}"]))
    if options.push_to:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.push_to, exist_ok=True)
        print(api.upload_folder(repo_id=options.push_to, folder_path=folder))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
