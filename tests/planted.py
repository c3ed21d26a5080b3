"""Small faults that may be planted in a module's text: an operator, a comparison, a constant, a sign."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

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
