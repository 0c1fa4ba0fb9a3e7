"""Breaks the losses in small ways, one at a time, and shows which faults no test notices.

    python tools/mutate.py                          all of src/kilter/losses and src/kilter/ops.py
    python tools/mutate.py src/kilter/ops.py        one file; one elsewhere is judged by its own test file alone,
                                                    src/kilter/train/loop.py by tests/train/test_loop.py
    python tools/mutate.py --list                   what would be tried

A mutant flips a sign or an operator, drops a clip or a square, swaps two arguments or the branches of a choice, or
changes a constant or a comparison. Each runs the fast tests in a fork of this process, with the broken source in place
of the module; the files are never touched. Survivors are printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
DEFAULT = (SRC / "kilter" / "ops.py", SRC / "kilter" / "losses")
TESTS = (ROOT / "tests" / "losses", ROOT / "tests" / "reference")
PYTEST_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
TIMEOUT_SECONDS = 60

OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
}
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
DROPPED = {"clamp", "abs", "square", "exp", "detach", "triu", "sum", "log", "relu"}
"""Methods that leave something of the same kind when they are dropped: x.clamp(...) becomes x."""
EXCHANGED = {"maximum": "minimum", "minimum": "maximum", "logsigmoid": "sigmoid", "expm1": "exp", "rsqrt": "sqrt"}
COMMUTATIVE = {"maximum", "minimum", "max", "min", "logaddexp", "isinstance", "getattr"}


class Mutant(NamedTuple):
    """One broken version of a file."""

    path: Path
    line: int
    what: str
    source: str


class _Site(NamedTuple):
    """A place in the tree and how to break it: `apply` changes a copy of the node found at `index` of a walk."""

    index: int
    line: int
    what: str
    change: str
    argument: object


def _sites(tree: ast.AST) -> Iterator[_Site]:
    skipped = _skipped(tree)
    for index, node in enumerate(ast.walk(tree)):
        if node in skipped:
            continue
        line = getattr(node, "lineno", 0)
        match node:
            case ast.BinOp(op=op):
                for other in OPERATORS.get(type(op), ()):
                    yield _Site(index, line, f"{type(op).__name__} -> {other.__name__}", "op", other)
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                yield _Site(index, line, f"drop {type(node.op).__name__}", "operand", None)
            case ast.Compare(ops=comparisons):
                for place, op in enumerate(comparisons):
                    for other in COMPARISONS.get(type(op), ()):
                        what = f"{type(op).__name__} -> {other.__name__}"
                        yield _Site(index, line, what, "compare", (place, other))
            case ast.Constant(value=bool() as value):
                yield _Site(index, line, f"{value} -> {not value}", "constant", not value)
            case ast.Constant(value=int() | float() as value):
                yield _Site(index, line, f"{value} -> {value + 1}", "constant", value + 1)
            case ast.IfExp():
                yield _Site(index, line, "swap branches", "branches", None)
            case ast.BoolOp():
                yield _Site(index, line, "and <-> or", "boolean", None)
            case ast.Call(func=func, args=arguments, keywords=keywords):
                name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
                if isinstance(func, ast.Attribute) and name in DROPPED:
                    yield _Site(index, line, f"drop .{name}()", "receiver", None)
                if name in EXCHANGED and isinstance(func, ast.Attribute):
                    yield _Site(index, line, f"{name} -> {EXCHANGED[name]}", "attribute", EXCHANGED[name])
                if name not in COMMUTATIVE:
                    for place in range(len(arguments) - 1):
                        yield _Site(index, line, f"swap arguments {place} and {place + 1} of {name}", "swap", place)
                if {keyword.arg for keyword in keywords} >= {"min", "max"}:
                    yield _Site(index, line, f"drop min of {name}", "keyword", "min")
                    yield _Site(index, line, f"drop max of {name}", "keyword", "max")
            case ast.FunctionDef(args=ast.arguments(args=parameters)):
                for place in range(len(parameters) - 1):
                    yield _Site(index, line, f"swap parameters {place} and {place + 1} of {node.name}", "params", place)


def _skipped(tree: ast.AST) -> set[ast.AST]:
    """Nodes that are no behaviour: error texts, `__str__`, annotations."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr) or (
            isinstance(node, ast.FunctionDef) and node.name == "__str__"
        ):
            found |= set(ast.walk(node))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.AST):
                found |= set(ast.walk(annotation))
    return found


def _apply(tree: ast.Module, site: _Site) -> str:
    """The source with one node changed."""
    tree = copy.deepcopy(tree)
    node = next(node for index, node in enumerate(ast.walk(tree)) if index == site.index)
    match node, site.change, site.argument:
        case ast.BinOp(), "op", type() as other:
            node.op = other()
        case ast.Compare(), "compare", (int() as place, type() as other):
            node.ops[place] = other()
        case ast.Constant(), "constant", value:
            node.value = value  # type: ignore[assignment]
        case ast.IfExp(), "branches", _:
            node.body, node.orelse = node.orelse, node.body
        case ast.BoolOp(), "boolean", _:
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case ast.Call(func=ast.Attribute() as func), "attribute", str() as name:
            func.attr = name
        case ast.Call(), "swap", int() as place:
            node.args[place], node.args[place + 1] = node.args[place + 1], node.args[place]
        case ast.Call(), "keyword", name:
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != name]
        case ast.FunctionDef(), "params", int() as place:
            names = node.args.args
            names[place].arg, names[place + 1].arg = names[place + 1].arg, names[place].arg
        case ast.UnaryOp(), "operand", _:
            tree = _Replace(node, node.operand).visit(tree)
        case ast.Call(func=ast.Attribute() as func), "receiver", _:
            tree = _Replace(node, func.value).visit(tree)
        case _:
            raise AssertionError(site)
    return ast.unparse(ast.fix_missing_locations(tree))


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants_of(path: Path) -> list[Mutant]:
    """Every broken version of one file; those on a line with `# same ...` are known to change nothing."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    sites = [site for site in _sites(tree) if "# same" not in lines[max(site.line, 1) - 1]]
    return [Mutant(path, site.line, site.what, _apply(tree, site)) for site in sites]


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the mutant's source when its module is imported."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        self.name, self.mutant = name, mutant

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=str(self.mutant.path))

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self.mutant.path)
        exec(compile(self.mutant.source, str(self.mutant.path), "exec"), module.__dict__)


def _tests_for(path: Path) -> list[str]:
    """All fast tests of losses, those named after the file first so that most mutants end early; elsewhere its own."""
    own = ROOT / "tests" / path.parent.name / f"test_{path.stem}.py"
    if path.is_relative_to(SRC) and path.parent.name not in ("kilter", "losses"):
        return [str(own)]
    files = sorted(file for folder in TESTS for file in folder.glob("test_*.py"))
    return [str(file) for file in sorted(files, key=lambda file: file.stem != f"test_{path.stem}")]


def run(mutant: Mutant | None, path: Path) -> bool:
    """True when the tests pass. Runs in a fork: torch and pytest are loaded once, here."""
    import pytest

    pid = os.fork()
    if pid == 0:
        os.setpgrp()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if mutant is not None:
            name = ".".join(path.relative_to(SRC).with_suffix("").parts)
            sys.meta_path.insert(0, _Broken(name.removesuffix(".__init__"), mutant))
        status = pytest.main([*PYTEST_OPTIONS, *_tests_for(path)])
        os._exit(int(status))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; default: the losses and ops.py")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    roots = [path.resolve() for path in options.paths] or list(DEFAULT)
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.glob("*.py")))]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.path.relative_to(ROOT)}:{mutant.line}: {mutant.what}")
        return 0
    import hypothesis
    import numpy
    import torch

    torch.set_num_threads(1)
    assert hypothesis and numpy
    start = time.monotonic()
    if not all(run(None, file) for file in files[:1]):
        print("the tests fail without any mutation: mend them first")
        return 2
    survivors = []
    for count, mutant in enumerate(mutants, 1):
        if run(mutant, mutant.path):
            survivors.append(mutant)
            print(f"SURVIVED {mutant.path.relative_to(ROOT)}:{mutant.line}: {mutant.what}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{count}/{len(mutants)}", end="", file=sys.stderr)
    print(f"{len(mutants)} mutants, {len(survivors)} survived, {time.monotonic() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
