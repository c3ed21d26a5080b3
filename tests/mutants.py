"""Small faults planted at random, one at a time, and whether a module's own tests notice them.

    make mutants                                            every module, 60 faults each (hours)
    make mutants ARGS="losses/pairs.py --count 20 --seed 1"

A fault is one operator, comparison, constant, sign, `and`, `or`, `not`, or one of a pair of names such as
`min` and `max`, replaced by its neighbour. Each is tried in a process of its own, forked before JAX starts,
in which the module is imported from the changed text; files are never changed. What no test notices is
printed with its line: it needs a test, or is equal (nothing that can be seen depends on it).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib._bootstrap_external as bootstrap
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "losses/bradley_terry.py": "bradley_terry",
    "losses/divergences.py": "divergences theory",
    "losses/pairs.py": "pairs formulas golden weighting",
    "losses/pairwise.py": "formulas golden laws",
    "losses/listwise.py": "listwise formulas golden laws",
    "losses/plackett_luce.py": "plackett_luce golden laws",
    "losses/unpaired.py": "unpaired formulas golden",
    "losses/whole_batch.py": "whole_batch pairs",
    "losses/weighting.py": "weighting",
    "models/log_probs.py": "log_probs",
    "models/quantized.py": "quantized",
    "models/rotary.py": "rotary",
    "models/sampling.py": "sampling",
    "data/encoding.py": "tokenization turns",
    "data/mismatched.py": "mismatched",
    "data/packing.py": "packing shapes",
    "data/preferences.py": "preferences ties parts row_layouts",
    "data/answers.py": "row_layouts",
    "data/layouts.py": "row_layouts",
    "data/sources.py": "preferences parts row_layouts sources",
    "data/tokenization.py": "tokenization turns",
    "intervals.py": "intervals",
    "evaluation/statistics.py": "statistics",
    "judging/length_control.py": "length_control",
    "huggingface/adapters.py": "adapter_files",
    "huggingface/weight_names.py": "weights families",
    "training/checkpoint.py": "checkpoint",
    "training/identity.py": "identity",
}
"""The tests that are to notice a fault in a module; `pairs` is `test_pairs.py` in the room that mirrors."""

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="} | {
    "is not": "is",
    "not in": "in",
    "is": "is not",
    "in": "not in",
}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "&": "|", "|": "&"}
NAMES = {
    "min": "max",
    "any": "all",
    "minimum": "maximum",
    "argmin": "argmax",
    "floor": "ceil",
    "first": "last",
}
NAMES |= {other: name for name, other in NAMES.items()}
PREIMPORTED = ("numpy", "jax", "jax.numpy", "flax.linen", "flax.nnx", "optax", "transformers", "beartype")
PREIMPORTED += ("yaml", "pyarrow.parquet", "safetensors.numpy", "tokenizers", "jinja2", "scipy.stats")


class Fault(NamedTuple):
    """A place in a module's text, and what stands there instead."""

    start: int
    """Characters from the beginning."""
    end: int
    new: str
    line: int

    def plant(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def describe(self, text: str) -> str:
        """The changed line, with `old → new` where it differs."""
        begin = text.rfind("\n", 0, self.start) + 1
        close = text.find("\n", self.end)
        before, after = text[begin : self.start].lstrip(), text[self.end : close]
        return f"line {self.line}: {before}⟦{text[self.start : self.end]} → {self.new or 'nothing'}⟧{after}"


class Places(ast.NodeVisitor):
    """Every fault that can be planted in a text; annotations, messages and docstrings have none."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.faults: list[Fault] = []
        self._lines = [0]
        for line in text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._raw = text.splitlines(keepends=True)

    def _at(self, line: int, column: int) -> int:
        """Characters before a position whose column the parser gives in bytes."""
        return self._lines[line - 1] + len(self._raw[line - 1].encode()[:column].decode())

    def _span(self, node: ast.expr) -> tuple[int, int]:
        return (
            self._at(node.lineno, node.col_offset),
            self._at(node.end_lineno or node.lineno, node.end_col_offset or 0),
        )

    def _add(self, start: int, end: int, new: str) -> None:
        self.faults.append(Fault(start, end, new, self.text.count("\n", 0, start) + 1))

    def _between(self, left: ast.expr, right: ast.expr, table: dict[str, str]) -> None:
        """Replace the operator between two expressions; comments and parentheses there are left alone."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0]), self.text[start:end])
        found = re.search("|".join(map(re.escape, sorted(table, key=len, reverse=True))), gap)
        if found:
            self._add(start + found.start(), start + found.end(), table[found[0]])

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self._between(left, right, COMPARISONS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._between(node.left, node.right, OPERATORS)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, {"and": "or", "or": "and"})
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.USub, ast.Not)):
            self._add(self._span(node)[0], self._span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self._span(node)
        if isinstance(node.value, bool):
            self._add(start, end, str(not node.value))
        elif isinstance(node.value, int):
            self._add(start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self._add(start, end, repr(node.value * 2 or 1.0))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES:
            self._add(*self._span(node), NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in NAMES:
            end = self._span(node)[1]
            self._add(end - len(node.attr), end, NAMES[node.attr])
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults, *node.body]:
            if default is not None:
                self.visit(default)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Messages and their formats."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """What an error says."""


def possible_faults(text: str) -> list[Fault]:
    """Each place once, in order, without those that are no Python any more."""
    places = Places(text)
    places.visit(ast.parse(text))
    return [fault for fault in sorted(set(places.faults)) if _parses(fault.plant(text))]


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def import_from_text(path: Path, text: str) -> None:
    """Let the next import of a file compile this text instead, whatever bytecode is stored."""
    get_code = bootstrap.SourceLoader.get_code

    def get_changed(self: bootstrap.SourceLoader, fullname: str) -> CodeType | None:
        if Path(self.get_filename(fullname)) == path:  # pyright: ignore[reportAttributeAccessIssue]
            return self.source_to_code(text.encode(), str(path))
        return get_code(self, fullname)

    bootstrap.SourceLoader.get_code = get_changed


class QuickestFirst:
    """Of pytest: tests in the order of the seconds that they took without a fault, so that most faults are
    noticed at once."""

    def __init__(self, kept: Path) -> None:
        """`kept`: where the seconds stand, and are written where they do not."""
        self._kept, self._took = kept, Counter[str]()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._kept.exists():
            took = json.loads(self._kept.read_text(encoding="utf-8"))
            items.sort(key=lambda item: took.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if not self._kept.exists():
            self._kept.write_text(json.dumps(self._took), encoding="utf-8")


def passes(module: Path, text: str, tests: list[str], *, seconds: float) -> bool:
    """Whether the tests pass with a module of this text, in a fork; one that does not end fails."""
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(os.environ["MUTANTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            _run_tests(module, text, tests)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(module: Path, text: str, tests: list[str]) -> NoReturn:
    """In the fork: it ends without the parent's cleaning up."""
    import_from_text(module, text)
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
    kept = Path(os.environ["MUTANTS_LOG"]).with_name(f"{module.stem}.json")
    code = pytest.main([*options, *tests], plugins=[QuickestFirst(kept)])
    sys.stdout.flush()
    os._exit(int(code))


def try_module(name: str, *, count: int, minutes: float, seed: int) -> Iterator[tuple[Fault, bool]]:
    """Faults in the order in which a seed draws them, and whether each was noticed, for so many minutes.

    Raises:
      SystemExit: where the tests fail without any fault.
    """
    path = ROOT / "dpo" / name
    text = path.read_text(encoding="utf-8")
    tests = [str((ROOT / "tests" / name).parent / f"test_{test}.py") for test in TESTS[name].split()]
    began = time.monotonic()
    if not passes(path, text, tests, seconds=600):
        raise SystemExit(
            f"{name}: its tests fail without a fault: {Path(os.environ['MUTANTS_LOG']).read_text()[-1500:]}"
        )
    seconds = 30 + 5 * (time.monotonic() - began)
    faults = possible_faults(text)
    drawn = random.Random(f"{seed} {name}").sample(faults, min(count, len(faults)))
    for fault in drawn:
        if time.monotonic() - began > 60 * minutes:
            return
        yield fault, not passes(path, fault.plant(text), tests, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", nargs="*", help=f"below dpo/ (default: all): {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=60, help="faults in each module (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="for each module; no fault is planted after them (default: as many as it takes)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a file to add a line of JSON to for each module")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.module if name not in TESTS]
    if unknown:
        parser.error(f"no tests are named for {unknown[0]}; allowed: {', '.join(TESTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "MUTANTS_LOG": f"{scratch}/log",
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{scratch}/hypothesis",
            "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        sys.path.insert(0, str(ROOT / "tests"))
        for module in PREIMPORTED:
            importlib.import_module(module)
        for name in arguments.module or TESTS:
            tried = noticed = 0
            survivors = []
            text = (ROOT / "dpo" / name).read_text(encoding="utf-8")
            tries = try_module(name, count=arguments.count, minutes=arguments.minutes, seed=arguments.seed)
            for fault, was_noticed in tries:
                tried += 1
                noticed += was_noticed
                if not was_noticed:
                    survivors.append(fault.describe(text))
                    print(f"  dpo/{name} {survivors[-1]}", flush=True)
            print(f"dpo/{name}: {noticed} of {tried} noticed", flush=True)
            if arguments.out:
                record = {"module": name, "planted": tried, "noticed": noticed, "survivors": survivors}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
