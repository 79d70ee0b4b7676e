"""What a fresh installation promises: dependencies, extras, package data, and an import that is quick and silent."""

import ast
import hashlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "uninext_hf"
CORE_DEPENDENCIES = {"torch", "torchvision", "transformers", "numpy", "pillow", "safetensors", "huggingface-hub"}
CORE_MODULES = {"torch", "torchvision", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
EXTRAS = {
    "train": {"accelerate", "datasets", "pyyaml", "scipy", "pycocotools"},
    "eval": {"evaluate", "pycocotools", "scipy", "trackeval"},
    "video": {"av", "supervision"},
    "demo": {"gradio"},
    "kernels": {"kernels"},
    "export": {"onnx", "onnxscript", "onnxruntime"},
    "dev": {"ruff", "pre-commit", "build"},
    "test": {
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "timm",
        "accelerate",
        "scipy",
        "pycocotools",
    },
}
OPTIONAL_MODULES = sorted(
    {"accelerate", "datasets", "evaluate", "pycocotools", "scipy", "trackeval", "av", "supervision", "gradio"}
    | {"kernels", "onnx", "onnxscript", "onnxruntime", "timm", "hypothesis", "pytest"}
)

# Written to a file because the import itself must leave both streams empty. The audit hook sees what a patched
# function would miss (C level, swallowed exceptions) and keeps a failing run off the network.
PLAIN_IMPORT = """
import json, os, sys
events = []
def audit(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        events.append([event, str(args[:2])])
        if event.startswith("socket."):
            raise RuntimeError("network access during import")
sys.addaudithook(audit)
{statements}
with open(sys.argv[1], "w") as file:
    json.dump(events, file)
"""

# First everything our package imports from others, then the package itself: the difference is ours.
TIMED_IMPORT = """
import json, sys, time
start = time.process_time()
{statements}
middle, before = time.process_time(), set(sys.modules)
import uninext_hf
end, after = time.process_time(), set(sys.modules)
with open(sys.argv[1], "w") as file:
    json.dump({{"others": middle - start, "ours": end - middle, "added": sorted(after - before)}}, file)
"""


def run_python(code: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess, object]:
    """Run code in a new interpreter away from the checkout; the second value is what it wrote as JSON."""
    location = importlib.util.find_spec("uninext_hf").origin
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONWARN"))}
    environment["PYTHONPATH"] = str(Path(location).parents[1])
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(result)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(result.read_text())


def imports_from_others() -> str:
    """The top-level imports of core dependencies in `__init__.py` and the core files, as one statement a line."""
    statements = set()
    for path in [PACKAGE / "__init__.py", *PACKAGE.glob("*_uninext.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {node.module.split(".")[0]}
            else:
                continue
            if names <= CORE_MODULES:
                statements.add(ast.unparse(node))
    return "\n".join(sorted(statements))


def setup_arguments(monkeypatch) -> dict:
    captured = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def project_names(requirements: list[str]) -> set[str]:
    names = [re.match(r"[\w.-]+", requirement).group() for requirement in requirements]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


class TestImport:
    def test_prints_nothing_and_reaches_nothing(self, tmp_path):
        baseline, events_of_others = run_python(PLAIN_IMPORT.format(statements=imports_from_others()), tmp_path)
        done, events = run_python(PLAIN_IMPORT.format(statements="import uninext_hf"), tmp_path)
        assert not [event for event, _ in events if event.startswith("socket.")]
        assert len(events) <= len(events_of_others), events  # no process is started that others do not start anyway
        assert (done.stdout, done.stderr) == ("", ""), f"without us: {(baseline.stdout, baseline.stderr)}"

    def test_loads_no_extra_and_costs_little(self, tmp_path):
        runs = [run_python(TIMED_IMPORT.format(statements=imports_from_others()), tmp_path)[1] for _ in range(3)]
        roots = {name.split(".")[0] for name in runs[0]["added"]}
        assert "uninext_hf" in roots
        assert not roots.intersection(OPTIONAL_MODULES)
        # Both numbers come from one process, so a slow or busy machine changes them alike.
        assert min((run["others"] + run["ours"]) / run["others"] for run in runs) < 2

    def test_loads_no_sub_package(self, tmp_path):
        code = "import json, sys, uninext_hf\njson.dump(sorted(sys.modules), open(sys.argv[1], 'w'))"
        own = [name for name in run_python(code, tmp_path)[1] if name.startswith("uninext_hf.")]
        assert own
        assert not [name for name in own if not name.endswith("_uninext")]


class TestMetadata:
    def test_core_dependencies(self, monkeypatch):
        requirements = setup_arguments(monkeypatch)["install_requires"]
        assert project_names(requirements) == CORE_DEPENDENCIES
        assert len(requirements) == len(CORE_DEPENDENCIES)

    def test_extras(self, monkeypatch):
        extras = setup_arguments(monkeypatch)["extras_require"]
        assert {name: project_names(requirements) for name, requirements in extras.items()} == EXTRAS

    def test_version_is_that_of_the_package(self, monkeypatch):
        version = setup_arguments(monkeypatch)["version"]
        assert f'__version__ = "{version}"' in (PACKAGE / "__init__.py").read_text(encoding="utf-8")

    def test_console_script_points_to_a_function(self, monkeypatch):
        assert setup_arguments(monkeypatch)["entry_points"] == {"console_scripts": ["uninext=uninext_hf.cli:main"]}
        from uninext_hf.cli import main

        assert callable(main)

    def test_nothing_is_compiled(self, monkeypatch):
        assert not {"ext_modules", "cmdclass", "setup_requires"} & set(setup_arguments(monkeypatch))

    def test_pyproject_holds_no_metadata(self):
        assert not re.search(r"^\[(project|tool\.setuptools)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


class TestPackageData:
    def test_every_data_file_is_declared(self, monkeypatch):
        patterns = setup_arguments(monkeypatch)["package_data"]["uninext_hf"]
        declared = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
        present = {
            path
            for path in PACKAGE.rglob("*")
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
        }
        assert {PACKAGE / "py.typed", PACKAGE / "assets" / "vocab.txt"} <= declared
        assert present == declared

    def test_every_sub_package_is_found(self, monkeypatch):
        folders = {path.parent for path in PACKAGE.rglob("*.py")}
        names = {".".join(folder.relative_to(PACKAGE.parent).parts) for folder in folders}
        monkeypatch.chdir(ROOT)
        assert set(setup_arguments(monkeypatch)["packages"]) == names

    def test_vocabulary_is_the_uncased_bert_one(self):
        digest = hashlib.sha256((PACKAGE / "assets" / "vocab.txt").read_bytes()).hexdigest()
        assert digest == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


class TestReadmeBlocks:
    def find_block(self, *arguments: str) -> subprocess.CompletedProcess:
        script = str(ROOT / ".ci" / "readme_block.py")
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    @pytest.mark.parametrize(("name", "part"), [("ci:first-light", "uninext perceive"), ("ci:test", "pytest")])
    def test_readme_has_the_block(self, name, part):
        done = self.find_block(name)
        assert done.returncode == 0, done.stderr
        assert part in done.stdout

    def test_block_is_printed_without_fences(self, tmp_path):
        (tmp_path / "A.md").write_text(
            "text\n<!-- ci:test -->\n\n```bash\necho a &&\n  echo b\n```\n```bash\nno\n```\n"
        )
        done = self.find_block("ci:test", "--file", str(tmp_path / "A.md"))
        assert (done.returncode, done.stdout) == (0, "echo a &&\n  echo b\n")

    @pytest.mark.parametrize(
        "text",
        [
            "```bash\necho\n```\n",  # no comment
            "<!-- ci:test -->\n",  # nothing follows
            "<!-- ci:test -->\ntext\n```bash\necho\n```\n",  # not right after
            "<!-- ci:test -->\n```python\nx\n```\n",  # another language
            "<!-- ci:test -->\n```bash\necho\n",  # not closed
            "<!-- ci:test -->\n```bash\n\n```\n",  # empty
            "<!-- ci:test -->\n<!-- ci:test -->\n```bash\necho\n```\n",  # twice
            None,  # no file
        ],
    )
    def test_absent_block_is_refused_in_one_sentence(self, tmp_path, text):
        if text is not None:
            (tmp_path / "A.md").write_text(text)
        done = self.find_block("ci:test", "--file", str(tmp_path / "A.md"))
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"A\.md.*\.\n", done.stderr)
