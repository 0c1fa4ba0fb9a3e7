"""The shape of the code, held by tests: layers, light import, file sizes, forbidden calls."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "kilter"
LAYERS: dict[str, int] = {
    "errors": 0,
    **dict.fromkeys(("records", "config", "rundir"), 1),
    **dict.fromkeys(("data", "stats"), 2),
    **dict.fromkeys(("tree", "ops", "losses"), 3),
    "models": 4,
    **dict.fromkeys(("train", "scorers"), 5),
    **dict.fromkeys(("rollout", "evals"), 6),
    **dict.fromkeys(("world", "guard", "stages"), 7),
    "cli": 9,
}
SIDE = {"report", "annotate"}  # read files, never load torch: 0-2 only
SEPARATE = [{"train", "scorers"}, {"rollout", "evals"}, {"world", "guard"}]
NO_TORCH = {"errors", "records", "config", "rundir", "data", "stats", "report", "annotate"}
FILES = sorted(SRC.rglob("*.py"))
ROOT = SRC.parents[1]
SCRIPTS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("bench/*.py")])


def part_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[str, int]]:
    """Every absolute module that a file imports, with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            module = node.module or ""
            found += [(f"{module}.{name.name}" if module == "kilter" else module, node.lineno) for name in node.names]
    return found


def violations(part: str, module: str) -> str | None:
    """Why `part` may not import `module`, or None. The rule itself, so that a test can see it go red."""
    root, _, rest = module.partition(".")
    if part in NO_TORCH and root in ("torch", "transformers", "peft"):
        return f"{part} must not load {root}"
    if root != "kilter" or not rest or rest == "__version__":
        return None
    other = rest.split(".")[0]
    if other == part or part == "__init__":
        return None
    if other == "cli":
        return "nothing imports cli"
    if part in SIDE:
        return None if LAYERS.get(other, 9) <= 2 else f"{part} reads files only; it must not import {other}"
    if other in SIDE:
        return None if part in ("cli", "stages") else f"{part} must not import {other}"
    if part == "losses":
        return None if other == "ops" else "losses imports ops only"
    if any({part, other} <= pair for pair in SEPARATE):
        return f"{part} and {other} do not import each other"
    return None if LAYERS[other] <= LAYERS[part] else f"{part} (layer {LAYERS[part]}) imports upwards {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    wrong = [f"{path}:{line}: {why}" for module, line in imports(path) if (why := violations(part, module))]
    assert not wrong, "\n".join(wrong)


def test_the_rule_can_fail() -> None:
    assert violations("losses", "kilter.tree")
    assert violations("report", "kilter.models.trunk")
    assert violations("data", "torch")
    assert violations("train", "kilter.scorers")
    assert violations("tree", "kilter.models")
    assert not violations("stages", "kilter.world")


def test_truth_is_imported_by_judges_alone() -> None:
    allowed = {"annotators.py", "evaluation.py", "audit.py", "truth.py", "__init__.py"}
    for path in FILES:
        for module, line in imports(path):
            if module.startswith("kilter.world.truth"):
                assert path.name in allowed and part_of(path) == "world", f"{path}:{line}: truth is for judges alone"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_long_files_and_no_unsafe_calls(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600, f"{path} is over 600 lines: split it by what it is about"
    for call in ("torch.load(", "yaml.load(", "trust_remote_code=True", "import pickle"):
        assert call not in text, f"{path}: {call}"


@pytest.mark.parametrize("module", ["kilter", "kilter.cli", "kilter.data", "kilter.stats", "kilter.report"])
def test_light_import(module: str) -> None:
    code = f"import sys, {module}; sys.exit(','.join(m for m in ('torch', 'transformers') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by name, and of two it would run one."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def missing_names(path: Path) -> list[str]:
    """What a script imports from Kilter or from the scripts beside it that is not there any more. Nothing is run."""
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        beside = path.with_name(f"{node.module}.py")
        if node.module.partition(".")[0] == "kilter":
            module = importlib.import_module(node.module)
            there = {name.name for name in node.names if hasattr(module, name.name) or _is_module(module, name.name)}
        elif beside.exists():
            there = _defined(ast.parse(beside.read_text()))
        else:
            continue
        wrong += [f"{path}:{node.lineno}: {node.module} has no {n.name}" for n in node.names if n.name not in there]
    return wrong


def _is_module(package: ModuleType, name: str) -> bool:
    return hasattr(package, "__path__") and importlib.util.find_spec(f"{package.__name__}.{name}") is not None


def _defined(tree: ast.Module) -> set[str]:
    """The names that a script gives: its functions, classes, constants and imports."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(name.asname or name.name).partition(".")[0] for name in node.names}
        else:
            names |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_what_is_there(path: Path) -> None:
    """The type checker reads the package alone, and a study is run seldom."""
    assert missing_names(path) == []


def test_a_name_that_went_away_is_seen(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from kilter.report.panels import line\nSIZE = 3\n")
    two = tmp_path / "two.py"
    two.write_text("from one import SIZE, line, text\nfrom kilter import stats, nothing\nfrom json import missing\n")
    assert missing_names(two) == [f"{two}:1: one has no text", f"{two}:2: kilter has no nothing"]
