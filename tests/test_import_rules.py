"""The import rules of the architecture, checked by walking the syntax trees of the sources.

Nothing is imported: the rules hold for files that need an extra, and for lines that no test reaches.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "uninext_hf"

LAYERS = {
    "task": 0,
    "box_ops": 0,
    "instances": 1,
    "prompt": 1,
    "configuration": 1,
    "deformable_attention": 2,
    "image_processing": 2,
    "matching": 2,
    "denoising": 2,
    "mask_head": 2,
    "loss": 2,
    "modeling": 3,
    "processing": 3,
    "tracking": 3,
    "prompt_cache": 3,
    "video": 4,
    "explanation": 4,
    "pipeline": 5,
}
SAME_LAYER = {("loss", "matching"), ("loss", "mask_head")}
NOT_IN_MODELING = {"prompt", "instances", "processing", "tracking", "prompt_cache", "video", "explanation"}
ONLY_IN_TRACKING = {"instances", "box_ops"}
THIRD_PARTY = {"torch", "torchvision", "numpy", "PIL", "huggingface_hub", "transformers"}
ANY = "*"
# Sub-package -> what it may import besides the core and itself. A file inside a sub-package is written `package.file`.
SUB_PACKAGES = {
    "data": set(),
    "conversion": set(),
    "kernels": set(),
    "training": {"data", "evaluation.runner"},
    "evaluation": {"data"},
    "cli": {ANY},
}
VAGUE_FILE_NAMES = {"utils.py", "misc.py", "common.py"}

TASK_NAMES = {"detection", "instance-segmentation", "rec", "res", "mot", "mots", "vis", "rvos", "sot", "vos"}
DATASET_NAMES = {  # lower case, letters and digits only
    *("coco", "lvis", "objects365", "refcoco", "refcocog", "grefcoco"),
    *("bdd", "bdd100k", "mot17", "mot20", "mots20", "kitti"),
    *("ytvis", "youtubevis", "ovis", "ytvos", "youtubevos", "refytvos", "refyoutubevos"),
    *("davis", "davis16", "davis17", "refdavis", "refdavis17"),
    *("lasot", "lasotext", "trackingnet", "tnl2k", "got10k"),
}
NAMES_ALLOWED_IN = ("task_uninext.py", "data/", "evaluation/benchmarks.py", "conversion/")
CLI_HELP_KEYWORDS = {"help", "short_help", "epilog", "metavar"}

SOURCES = {
    PurePosixPath(path.relative_to(PACKAGE).as_posix()): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
}

Rule = Callable[[PurePosixPath, ast.Module], Iterator[tuple[int, str]]]


def core_name(path: PurePosixPath) -> str | None:
    """`modeling` for `modeling_uninext.py` directly in the package, None for a file outside the core."""
    return path.stem.removesuffix("_uninext") if len(path.parts) == 1 and path.stem.endswith("_uninext") else None


def own_imports(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of our own package, with the dotted target relative to the package ("" is the package itself)."""
    folder = path.parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, _, rest = alias.name.partition(".")
                if root == "uninext_hf":
                    yield node, rest
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(folder[: len(folder) - node.level + 1]) + (node.module.split(".") if node.module else [])
            elif node.module and node.module.split(".")[0] == "uninext_hf":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                yield node, ".".join([*base, alias.name])


def core_targets(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Imports of core files, with the short name of the file."""
    for node, target in own_imports(path, tree):
        first = target.split(".")[0]
        if first.endswith("_uninext"):
            yield node, first.removesuffix("_uninext")


def third_party_imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, bool, bool]]:
    """Absolute imports beyond the standard library and ourselves: node, root, inside a function, inside a try."""

    def visit(node: ast.AST, in_function: bool, in_try: bool) -> Iterator[tuple[ast.stmt, str, bool, bool]]:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            root = name.split(".")[0]
            if root not in sys.stdlib_module_names and root != "uninext_hf":
                yield node, root, in_function, in_try
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        in_try = in_try or isinstance(node, ast.Try)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function, in_try)

    yield from visit(tree, False, False)


def string_literals(tree: ast.AST, skipped_keywords: set[str]) -> Iterator[tuple[int, str]]:
    """String constants of a file without docstrings and without the values of the named keyword arguments."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg in skipped_keywords:
            skipped.update(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def is_task_or_dataset(text: str) -> bool:
    """Whether a literal is such a name. A text with spaces is prose for a reader, not a name."""
    text = text.lower()
    if re.search(r"\s", text):
        return False
    parts = {*re.split(r"[^a-z0-9]+", text), re.sub(r"[^a-z0-9]", "", text)}
    return text in TASK_NAMES or not parts.isdisjoint(DATASET_NAMES)


def rule_core_spelling(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if core_name(path) is None:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""
            if node.level > 1 or not re.fullmatch(r"\w+_uninext", module) or node.names[0].name == "*":
                yield (
                    node.lineno,
                    "write `from .name_uninext import thing`; the export to the Hub finds no other spelling",
                )
        elif any(name.split(".")[0] == "uninext_hf" for name in absolute_names(node)):
            yield node.lineno, "the core must not import `uninext_hf` by name: on the Hub there is no such package"


def absolute_names(node: ast.AST) -> list[str]:
    """Modules that a statement imports by absolute name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


def rule_core_layers(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    name = core_name(path)
    if name is None:
        return
    if name not in LAYERS:
        yield 1, f"`{path}` has no layer; add it to LAYERS here and to the table in CONTRIBUTING.md"
        return
    for node, target in core_targets(path, tree):
        if target not in LAYERS:
            yield node.lineno, f"`{target}_uninext` has no layer; add it to LAYERS here and to CONTRIBUTING.md"
        elif LAYERS[target] >= LAYERS[name] and (name, target) not in SAME_LAYER:
            yield (
                node.lineno,
                f"`{name}` (layer {LAYERS[name]}) must not import `{target}` (layer {LAYERS[target]}); "
                "move what is shared to a lower layer or pass it as a value",
            )


def rule_modeling_knows_tensors_only(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if core_name(path) == "modeling":
        for node, target in core_targets(path, tree):
            if target in NOT_IN_MODELING:
                yield node.lineno, f"the network knows tensors only and must not import `{target}`"


def rule_tracking_knows_instances_only(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if core_name(path) == "tracking":
        for node, target in core_targets(path, tree):
            if target not in ONLY_IN_TRACKING:
                yield node.lineno, f"a tracker works on instances and boxes and must not import `{target}`"


def rule_core_third_party(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """An optional package is imported in a function, in a `try`.

    At top level it would be loaded by `import uninext_hf`; outside a `try`, transformers refuses to load the file as
    remote code on a machine without the package, even when the import sits in a function.
    """
    if core_name(path) is None:
        return
    for node, root, in_function, in_try in third_party_imports(tree):
        if root not in THIRD_PARTY and not (in_function and in_try):
            yield node.lineno, f"`{root}` is optional for the core; import it inside a function, in a `try`"


def rule_core_without_sub_packages(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if core_name(path) is None:
        return
    for node, target in own_imports(path, tree):
        if target.split(".")[0] in SUB_PACKAGES:
            yield node.lineno, f"the core must not import the sub-package `{target.split('.')[0]}`"


def rule_init_without_sub_packages(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`__init__.py` may reach a sub-package only inside a function, when somebody asks for it."""
    if path != PurePosixPath("__init__.py"):
        return
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    later = {inner for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    for node, target in own_imports(path, tree):
        if node not in later and target.split(".")[0] in SUB_PACKAGES:
            yield node.lineno, f"`import uninext_hf` must not load the sub-package `{target.split('.')[0]}`"


def rule_sub_package_directions(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if len(path.parts) == 1:
        return
    package = path.parts[0]
    if package not in SUB_PACKAGES:
        yield 1, f"the sub-package `{package}` has no row in SUB_PACKAGES"
        return
    allowed = SUB_PACKAGES[package]
    for node, target in own_imports(path, tree):
        first = target.split(".")[0]
        if first in SUB_PACKAGES and first != package and allowed.isdisjoint({ANY, first}):
            if any(target == entry or target.startswith(entry + ".") for entry in allowed):
                continue
            yield node.lineno, f"`{package}` must not import `{target}`; it may import the core and {sorted(allowed)}"


def rule_file_names(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if path.name in VAGUE_FILE_NAMES:
        yield 1, "name the noun that the file is about"
    if len(path.parts) == 1 and core_name(path) is None and path.name not in {"__init__.py", "__main__.py"}:
        yield 1, "a file directly in the package belongs to the core, and its name ends in `_uninext.py`"


def rule_names_are_data(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if str(path).startswith(NAMES_ALLOWED_IN):
        return
    skipped_keywords = CLI_HELP_KEYWORDS if path.parts[0] == "cli" else set()
    for line, text in string_literals(tree, skipped_keywords):
        if is_task_or_dataset(text):
            yield line, f'"{text}" is the name of a task or data set; read it from the tables in {NAMES_ALLOWED_IN}'


def violations(rule: Rule, path: str | PurePosixPath, source: str | ast.Module) -> list[str]:
    """Messages `file:line: reason` of one rule for one file."""
    tree = ast.parse(source) if isinstance(source, str) else source
    return [f"src/uninext_hf/{path}:{line}: {reason}" for line, reason in rule(PurePosixPath(path), tree)]


def check(rule: Rule) -> None:
    found = [message for path, tree in SOURCES.items() for message in violations(rule, path, tree)]
    assert not found, "\n".join(found)


def test_there_is_a_core():
    assert any(core_name(path) for path in SOURCES)


def test_core_imports_siblings_in_the_one_spelling_that_can_be_exported():
    check(rule_core_spelling)


def test_core_imports_lower_layers_only():
    check(rule_core_layers)


def test_modeling_knows_tensors_only():
    check(rule_modeling_knows_tensors_only)


def test_tracking_imports_instances_and_box_ops_only():
    check(rule_tracking_knows_instances_only)


def test_core_third_party_modules():
    check(rule_core_third_party)


def test_core_never_imports_sub_packages():
    check(rule_core_without_sub_packages)


def test_package_import_loads_no_sub_package():
    check(rule_init_without_sub_packages)


def test_sub_packages_import_in_one_direction():
    check(rule_sub_package_directions)


def test_file_names_say_the_noun():
    check(rule_file_names)


def test_task_and_dataset_names_stay_in_their_tables():
    check(rule_names_are_data)


def test_examples_and_integration_tests_use_public_names():
    found = []
    for path in sorted([*ROOT.glob("examples/**/*.py"), *ROOT.glob("tests/integration/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = absolute_names(node)
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "uninext_hf" and any(p.endswith("_uninext") or p.startswith("_") for p in parts[1:]):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: `{name}` is not a public name")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (rule_core_spelling, "video_uninext.py", "from . import box_ops_uninext"),  # copied by no export
        (rule_core_spelling, "video_uninext.py", "from .ops.boxes_uninext import area"),  # sub-folder
        (rule_core_spelling, "video_uninext.py", "def f():\n    from ..boxes_uninext import area"),  # parent, nested
        (rule_core_spelling, "video_uninext.py", "from .task_uninext import *"),  # star
        (rule_core_spelling, "video_uninext.py", "import uninext_hf.task_uninext"),  # absolute
        (rule_core_spelling, "video_uninext.py", "from uninext_hf.task_uninext import TASKS"),  # absolute, from
        (rule_core_layers, "task_uninext.py", "from .prompt_uninext import Prompt"),  # upwards
        (rule_core_layers, "matching_uninext.py", "from .loss_uninext import dice_loss"),  # same layer, wrong way
        (rule_core_layers, "helpers_uninext.py", "x = 1"),  # unknown file
        (rule_core_layers, "loss_uninext.py", "from .helpers_uninext import x"),  # unknown target
        (rule_modeling_knows_tensors_only, "modeling_uninext.py", "from .prompt_uninext import Prompt"),
        (
            rule_tracking_knows_instances_only,
            "tracking_uninext.py",
            "from .configuration_uninext import UninextConfig",
        ),
        (rule_core_third_party, "loss_uninext.py", "import scipy.optimize"),  # top level
        (rule_core_third_party, "loss_uninext.py", "try:\n    import scipy\nexcept ImportError:\n    scipy = None"),
        (rule_core_third_party, "loss_uninext.py", "def f():\n    import scipy"),  # stops remote code
        (rule_core_without_sub_packages, "loss_uninext.py", "def f():\n    from .kernels import status"),
        (rule_core_without_sub_packages, "loss_uninext.py", "from uninext_hf.data import Sample"),
        (rule_core_without_sub_packages, "loss_uninext.py", "from . import kernels"),
        (rule_init_without_sub_packages, "__init__.py", "from .training import UninextTrainer"),
        (rule_sub_package_directions, "data/sample.py", "from ..training.trainer import UninextTrainer"),
        (rule_sub_package_directions, "training/trainer.py", "from ..evaluation import formats"),
        (rule_sub_package_directions, "data/readers/coco.py", "from ...cli import main"),  # deeper folder
        (rule_sub_package_directions, "stuff/thing.py", "x = 1"),  # unknown sub-package
        (rule_file_names, "data/utils.py", "x = 1"),
        (rule_file_names, "boxes.py", "x = 1"),  # core file without the suffix
        (rule_names_are_data, "processing_uninext.py", 'if task == "rvos": pass'),
        (rule_names_are_data, "training/trainer.py", 'is_coco = "coco_2017_train" in names'),
        (rule_names_are_data, "tracking_uninext.py", 'PRESETS = {"YouTube-VIS": 1}'),
        (rule_names_are_data, "cli/perceive.py", 'option(default="lasot", help="a benchmark")'),
    ],
)
def test_a_planted_violation_is_found(rule, path, source):
    found = violations(rule, path, source)
    assert len(found) == 1
    assert found[0].startswith(f"src/uninext_hf/{path}:")


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (rule_core_spelling, "video_uninext.py", "def f():\n    from .task_uninext import TASKS"),
        (
            rule_core_layers,
            "loss_uninext.py",
            "from .matching_uninext import Match\nfrom .mask_head_uninext import up",
        ),
        (
            rule_core_third_party,
            "loss_uninext.py",
            "import math\nimport torch.nn.functional as F\nfrom PIL import Image",
        ),
        (
            rule_core_third_party,
            "instances_uninext.py",
            "def f():\n    try:\n        import scipy\n    except ImportError as error:\n        raise error",
        ),
        (rule_init_without_sub_packages, "__init__.py", "def __getattr__(name):\n    from . import kernels"),
        (
            rule_sub_package_directions,
            "training/trainer.py",
            "from ..evaluation.runner import run\nfrom ..data import x",
        ),
        (rule_sub_package_directions, "cli/convert.py", "from ..conversion import load_official"),
        (rule_names_are_data, "loss_uninext.py", '"""rvos."""\nmessage = "trained on coco"\nvisible = "visible"'),
        (rule_names_are_data, "data/readers/coco.py", 'name = "coco"'),
        (rule_names_are_data, "cli/perceive.py", 'option(help="rvos")'),
    ],
)
def test_what_is_allowed_is_not_reported(rule, path, source):
    assert violations(rule, path, source) == []
