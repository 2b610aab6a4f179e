"""Imports between the parts of h2rec go down only, and only to packages that a part may need."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part may import those with a lower rank, none of its own.
RANK = {
    "testing": 8,
    "cli": 7,
    "training": 6,
    "planning": 6,  # formulas: it imports nothing
    "models": 5,
    "data": 5,
    "tokenizers": 5,
    "h2rec": 4,  # h2rec/__init__.py: the names that `import h2rec` offers
    "layers": 3,
    "semantic_ids": 2,
    "optim": 2,
    "ops": 1,
    "reference": 0,
    "kernels": 0,
    "_C": 0,
    "_catalog": 0,
    "_version": 0,
    "_files": 0,
}
ONLY_FOR = {"_catalog": {"data", "tokenizers", "semantic_ids"}}

EVERYWHERE = {"torch", "numpy", "safetensors"}
PACKAGES = {
    "kernels": {"triton"},
    "data": {"polars", "wordllama"},
    "tokenizers": {"polars", "matplotlib"},
    "training": {"lightning", "polars", "matplotlib", "rich", "faiss"},
    "cli": {"typer", "rich", "polars"},
}


def violations(root: Path) -> list[str]:
    """What is wrong with the imports of the tree at `root`, one line each."""
    found = []
    for path in sorted(root.glob("h2rec/**/*.py")) + sorted(root.glob("kernels/**/*.py")):
        place = path.relative_to(root).with_suffix("").parts
        module = (("h2rec",) if place[0] == "kernels" else ()) + place
        for line, imported in imports_of(path, module):
            if reason := why_not(module, imported):
                found.append(f"{path.relative_to(root)}:{line}: {'.'.join(imported)}: {reason}")
    for path in (path for top in ("tests", "benchmarks") for path in sorted((root / top).glob("**/*.py"))):
        for line, imported in imports_of(path, path.relative_to(root).with_suffix("").parts):
            if imported[0] == "kernels":
                found.append(f"{path.relative_to(root)}:{line}: {KERNELS}")
    return found


KERNELS = "kernels is imported as h2rec.kernels: by another name it is another module"


def why_not(module: tuple[str, ...], imported: tuple[str, ...]) -> str | None:
    """Why `module` must not import `imported` (both dotted names, split), or None."""
    part = part_of(module)
    if part not in RANK:
        return f"h2rec/{part} is not a part that the design knows"
    if imported[0] == "kernels":
        return KERNELS
    if imported[0] != "h2rec":
        known = EVERYWHERE | sys.stdlib_module_names | PACKAGES.get(part, set())
        return None if imported[0] in known else f"{part} has no use for {imported[0]}"
    target = part_of(imported)
    if target not in RANK:
        target = "h2rec"  # a name that it offers, such as h2rec.SemanticIds
    if target == part:
        return None
    if part not in ONLY_FOR.get(target, {part}):
        return f"{target} serves {', '.join(sorted(ONLY_FOR[target]))} only, not {part}"
    return None if RANK[target] < RANK[part] or target == "_version" else f"{part} must not import {target}"


def part_of(module: tuple[str, ...]) -> str:
    """The name below h2rec."""
    if len(module) == 1 or module[1] == "__init__":
        return "h2rec"
    return module[1]


def imports_of(path: Path, module: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted name of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:  # of `from h2rec import ops` the name matters, too
                yield node.lineno, (*base, alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in {"import_module", "__import__"}:
                yield node.lineno, tuple(str(node.args[0].value).split("."))


def test_imports_go_down_only():
    assert violations(ROOT) == []


def test_only_ops_registers_with_torch():
    registering = [
        path.relative_to(ROOT)
        for top in ("h2rec", "kernels")
        for path in ROOT.glob(f"{top}/**/*.py")
        if "torch.library" in path.read_text() and path.parent != ROOT / "h2rec" / "ops"
    ]
    assert registering == []


GOOD = {
    "h2rec/__init__.py": "from h2rec import layers, ops\nfrom h2rec._version import __version__",
    "h2rec/layers/__init__.py": "from h2rec.layers.hash_embedding import HashEmbedding",
    "h2rec/layers/hash_embedding.py": "import math\nimport torch\nfrom h2rec import ops",
    "h2rec/semantic_ids.py": "def group():\n    from h2rec._catalog import group_codes",
    "h2rec/ops/score.py": "import importlib\nfrom ._checks import check\nimportlib.import_module('h2rec._C')",
    "h2rec/data/__init__.py": "import polars as pl",
    "h2rec/cli.py": "import h2rec\nfrom h2rec import SemanticIds, models, show_config\nimport h2rec.training.report",
    "kernels/quantize.py": "import triton.language as tl\nfrom .tiles import tile",
    "tests/test_x.py": "import pyarrow\nfrom h2rec import kernels",
}
BAD = {
    "upwards": ("h2rec/ops/a.py", "from h2rec.layers import HashEmbedding", "ops must not import layers"),
    "upwards, by name": ("h2rec/layers/a.py", "from h2rec import models", "layers must not import models"),
    "upwards, relative": (
        "h2rec/ops/a.py",
        "from ..layers import HashEmbedding",
        "ops must not import layers",
    ),
    "upwards, in a function": (
        "h2rec/optim.py",
        "def f():\n    import h2rec.layers",
        "optim must not import layers",
    ),
    "upwards, dynamic": (
        "h2rec/ops/a.py",
        "import importlib\nimportlib.import_module('h2rec.data')",
        "ops must not import data",
    ),
    "through the top": ("h2rec/layers/a.py", "from h2rec import SemanticIds", "layers must not import h2rec"),
    "sideways": ("h2rec/data/a.py", "from h2rec.models import H2Rec", "data must not import models"),
    "lazy data at the top": ("h2rec/__init__.py", "from h2rec import data", "h2rec must not import data"),
    "catalog": ("h2rec/layers/a.py", "from h2rec._catalog import group_codes", "not layers"),
    "kernels upwards": ("kernels/a.py", "from h2rec.ops import score_topk", "kernels must not import ops"),
    "kernels by itself": ("h2rec/ops/a.py", "import kernels.a", "another module"),
    "kernels in tests": ("tests/ops/test_a.py", "from kernels import a", "another module"),
    "unknown package": ("h2rec/models/a.py", "import pandas", "models has no use for pandas"),
    "package of another part": ("h2rec/ops/a.py", "import polars", "ops has no use for polars"),
    "unknown part": ("h2rec/utils.py", "import torch", "not a part"),
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


def test_accepts_what_the_design_allows(tmp_path: Path):
    plant(tmp_path, GOOD)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("file", "source", "reason"), BAD.values(), ids=BAD)
def test_finds_a_planted_import(tmp_path: Path, file: str, source: str, reason: str):
    plant(tmp_path, GOOD)
    plant(tmp_path, {file: source})
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:{len(source.splitlines())}:")
    assert reason in found[0]
