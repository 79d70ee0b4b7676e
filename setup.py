"""Metadata, dependencies and extras of uninext-hf; checker settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "src" / "uninext_hf"


def read_version() -> str:
    """Return `__version__` from the package's source without importing it (that would need torch)."""
    match = re.search(
        r'^__version__ = "([^"]+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if match is None:
        raise RuntimeError('src/uninext_hf/__init__.py has no line of the form __version__ = "1.2.3".')
    return match.group(1)


# Lower bounds of torch, pillow, safetensors and huggingface_hub are those of transformers 5.23.
INSTALL_REQUIRES = [
    "torch>=2.6",
    "torchvision>=0.21",  # the release that belongs to torch 2.6
    "transformers>=5.23,<6",
    "numpy>=1.26",
    "pillow>=10.0.1",
    "safetensors>=0.8.0",
    "huggingface_hub>=1.31.0,<3",
]

# Everything beyond the core. A feature whose extra is missing says so in one sentence with the pip line.
EXTRAS_REQUIRE = {
    "train": ["accelerate>=1.1.0", "datasets", "pyyaml", "scipy", "pycocotools>=2.0.7"],
    "eval": ["evaluate>=0.4", "pycocotools>=2.0.7", "scipy", "trackeval"],
    "video": ["av", "supervision"],
    "demo": ["gradio"],
    "kernels": ["kernels"],  # transformers ignores a release outside the range it was built for, and says which
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "dev": ["ruff>=0.17,<0.18", "pre-commit", "build"],
    "test": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff>=0.17,<0.18",  # .ci/run checks style in the environment of the tests; one minor release formats alike
        "timm>=1.0.23",
        "accelerate>=1.1.0",
        "scipy",
        "pycocotools>=2.0.7",
    ],
}

setup(
    name="uninext-hf",
    version=read_version(),
    description="UNINEXT for Hugging Face Transformers: one model that finds instances in pictures and video",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The uninext_hf authors",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY_NOTICES.md"],
    keywords="uninext detection segmentation tracking referring-expression transformers pytorch",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"uninext_hf": ["py.typed", "assets/*", "recipes/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["uninext=uninext_hf.cli:main"]},
    zip_safe=False,  # vocab.txt is read from the file system
)
