"""What the source promises about itself: imports go down the layers, import is light, nothing prints or unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import monosem

PACKAGE = Path(monosem.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("textfiles",),
    ("config", "logs", "interrupts"),
    ("formats",),
    ("artifacts",),
    ("resources", "charts", "definitions", "explained"),
    ("torch_state",),
    ("types", "corpora"),
    ("losses",),
    ("kernels",),
    ("variants",),
    ("model",),
    ("families", "loading", "vocabulary"),
    ("step", "subject", "tokens", "convert", "dtypes", "packing"),
    ("checkpoint", "activations", "n2g"),
    ("stream", "run_folder"),
    ("training", "evals", "scaling"),
    ("sweeps", "explanations"),
    ("main_job",),
    ("viewer",),
    ("export",),
    ("cli",),
    ("__main__",),
)
"""Lowest first. A module imports lower layers and its own package only: neither siblings nor anything higher."""

LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
TORCH_FREE = ("textfiles", "config", "formats", "artifacts", "logs", "interrupts", "resources", "charts", "definitions")
HEAVY = {"accelerate", "datasets", "gguf", "matplotlib", "plotly", "pyarrow", "scipy", "transformers"}
TORCH_FREE_BANS = HEAVY | {"torch", "numpy"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def sources() -> list[tuple[str, ast.Module]]:
    """(dotted module name below monosem, its syntax tree) for every file of the package but monosem/__init__.py."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found.append((name, ast.parse(path.read_text("utf-8"), str(path))))
    return found


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Every absolute name that `monosem.<module>` imports, inside functions too, and by import_module("literal")."""
    parents = ["monosem", *module.split(".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def layer_faults(module: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """The imports of `module` that do not go down the layers."""
    own = module.split(".")[0]
    faults = []
    for name in imported(tree, module, is_package):
        root, _, below = name.partition(".")
        target = below.split(".")[0]
        if root != "monosem" or target in (own, "__version__") or (own == "kernels" and target == "_native"):
            continue
        if target not in LEVEL or LEVEL[target] >= LEVEL[own]:
            faults.append(f"{module} imports {name}")
    return faults


def is_package(module: str) -> bool:
    return PACKAGE.joinpath(*module.split("."), "__init__.py").exists()


def calls(tree: ast.AST, name: str) -> bool:
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == name for node in ast.walk(tree))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_a_layer() -> None:
    assert [name for name, _ in sources() if name.split(".")[0] not in LEVEL] == []


def test_imports_go_down_the_layers() -> None:
    assert [fault for name, tree in sources() for fault in layer_faults(name, tree, is_package(name))] == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("types", "from monosem import model"),
        ("types", "from monosem.model import Autoencoder"),
        ("types", "def f():\n    import monosem.model"),
        ("types", "from . import model"),
        ("types", "import importlib\nimportlib.import_module('monosem.model')"),
        ("training", "from monosem.evals import evaluate"),
        ("subject", "from monosem import tokens"),
        ("evals.downstream", "from ..main_job import run"),
        ("model", "from monosem import _native"),
        ("model", "from monosem import harvest"),
    ],
)
def test_layer_faults_sees_an_upward_or_sideways_import(module: str, code: str) -> None:
    assert len(layer_faults(module, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("model", "from monosem import types, config"),
        ("evals.downstream", "from . import bootstrap\nfrom ..types import Metric"),
        ("kernels.native", "from monosem import _native"),
        ("training", "import torch, monosem.step"),
    ],
)
def test_layer_faults_accepts_a_downward_import(module: str, code: str) -> None:
    assert layer_faults(module, ast.parse(code)) == []


def test_layer_faults_resolves_a_relative_import_of_a_package() -> None:
    assert layer_faults("evals", ast.parse("from .bootstrap import ratio"), is_package=True) == []
    assert layer_faults("evals", ast.parse("from ..main_job import run"), is_package=True) == [
        "evals imports monosem.main_job.run"
    ]


def test_the_lowest_layers_know_nothing_of_torch() -> None:
    trees = dict(sources())
    for module in TORCH_FREE:
        roots = {name.split(".")[0] for name in imported(trees[module], module)}
        assert not roots & TORCH_FREE_BANS, module


def test_the_viewer_imports_no_torch() -> None:
    """Nor anything that does: only the live pages reach the model, on their first request."""
    code = "import sys, monosem.viewer.server; print(sorted({m.split('.')[0] for m in sys.modules}))"
    assert not set(ast.literal_eval(run_python(code))) & (HEAVY | {"torch"})


def test_heavy_libraries_are_imported_inside_the_functions_that_need_them() -> None:
    for module, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in imported(node, module)} & HEAVY, module


def test_importing_monosem_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, json; old = set(sys.modules); import monosem; print(json.dumps(sorted(set(sys.modules) - old)))"
    roots = {name.split(".")[0] for name in ast.literal_eval(run_python(code))}
    assert "monosem" in roots
    assert roots <= {"monosem", *sys.stdlib_module_names}


def test_every_public_name_is_the_same_object_every_time() -> None:
    """`monosem.train` is the function, also once the module `monosem.train` is loaded."""
    code = """
import importlib, types, monosem
before = {name: getattr(monosem, name) for name in monosem.__all__}
for home in set(monosem._HOMES.values()):
    importlib.import_module(f"monosem.{home}")
for name in monosem.__all__:
    assert getattr(monosem, name) is before[name] and not isinstance(before[name], types.ModuleType), name
"""
    run_python(code)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Autoencodr'"):
        _ = monosem.Autoencodr


def test_the_library_never_prints() -> None:
    assert [name for name, tree in sources() if name != "cli" and calls(tree, "print")] == []
    assert calls(ast.parse("def f():\n    print(1)"), "print")


def test_nothing_is_ever_unpickled() -> None:
    for module, tree in sources():
        assert not {name.split(".")[0] for name in imported(tree, module)} & UNPICKLERS, module
        assert not calls(tree, "torch.load"), module
        keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert not [k for k in keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"], module
