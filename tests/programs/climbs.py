"""Follows the spec through the code, and counts how often a reader must return to a module.

    python -m tests.programs.climbs [--show]

Starting at a function, all calls that pass on the spec are followed in reading order: calls with an argument (or on an
object) that is a part of the spec, or that has a part of it in a field. Each function is entered once. A call into
another module is an arrival, except for methods of the spec itself. An arrival at a module that was entered before and
left since is a climb: a reader must open this file again. Types come from mypy, so a call is followed if its target is
known statically.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mypy import build, nodes, types
from mypy.config_parser import parse_config_file
from mypy.find_sources import create_source_list
from mypy.options import Options

ROOT = Path(__file__).parents[2]
SPEC = {"RunSpec", "Resolved"}
ENTRIES = {"stages.run": ("stages", "run"), "submit": ("jobs", "submit")}


@dataclass
class Trip:
    """One walk: the arrivals, and the climbs among them."""

    types: dict[nodes.Expression, types.Type]
    parts: set[str]
    """the classes of the spec"""
    carriers: set[str]
    """those, and the classes that hold one in a field"""
    entered: set[str] = field(default_factory=set)
    arrivals: list[tuple[str, str]] = field(default_factory=list)
    """(module, function)"""
    climbs: int = 0

    def enter(self, function: nodes.FuncDef, module: str) -> None:
        if function.fullname in self.entered:
            return
        self.entered.add(function.fullname)
        for call in _calls(function):
            for target in self._targets(call):
                home = _module(target)
                if not home.startswith("distill"):
                    continue
                if home != module:
                    seen = {name for name, _ in self.arrivals}
                    if not self.arrivals or self.arrivals[-1][0] != home:
                        self.climbs += home in seen
                    self.arrivals.append((home, target.fullname))
                self.enter(target, home)

    def _targets(self, call: nodes.CallExpr) -> Iterator[nodes.FuncDef]:
        """The functions that a call runs, if it carries the spec."""
        given = [*call.args, *([call.callee.expr] if isinstance(call.callee, nodes.MemberExpr) else [])]
        asked = isinstance(call.callee, nodes.MemberExpr) and self._is_of(call.callee.expr, self.parts)
        if any(self._carries(each) for each in given):
            if not asked:
                yield from self._functions(call.callee)
            for argument in call.args:  # a function that is handed on runs there
                if not isinstance(argument, nodes.RefExpr) or not isinstance(argument.node, nodes.TypeInfo):
                    yield from self._functions(argument)

    def _functions(self, expression: nodes.Expression) -> Iterator[nodes.FuncDef]:
        node = expression.node if isinstance(expression, nodes.RefExpr) else None
        if node is None and isinstance(expression, nodes.MemberExpr):
            owner = types.get_proper_type(self.types.get(expression.expr))
            if isinstance(owner, types.Instance):
                found = owner.type.get(expression.name)
                node = None if found is None else found.node
        if isinstance(node, nodes.Decorator):
            node = None if node.func.is_property else node.func
        if isinstance(node, nodes.TypeInfo):
            found = node.names.get("__init__")
            node = None if found is None else found.node
        if isinstance(node, nodes.FuncDef) and node.body is not None:
            yield node

    def _carries(self, argument: nodes.Expression) -> bool:
        """Whether it is of a class that carries the spec, or a value of the spec, like stage.recipe."""
        if self._is_of(argument, self.carriers):
            return True
        while isinstance(argument, nodes.MemberExpr):
            argument = argument.expr
            if self._is_of(argument, self.parts):
                return True
        return False

    def _is_of(self, expression: nodes.Expression, classes: set[str]) -> bool:
        found = self.types.get(expression)
        return found is not None and any(name in classes for name in _names(found))


def _names(found: types.Type) -> Iterator[str]:
    """The classes in a type, those in containers and unions too."""
    proper = types.get_proper_type(found)
    if isinstance(proper, types.Instance):
        yield proper.type.fullname
        for argument in proper.args:
            yield from _names(argument)
    elif isinstance(proper, types.UnionType | types.TupleType):
        for item in proper.items:
            yield from _names(item)


def _module(function: nodes.FuncDef) -> str:
    """distill.execution.stages of distill.execution.stages.Work.progress."""
    name = function.fullname
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


MODULES: dict[str, nodes.MypyFile] = {}


ELSEWHERE = {"node", "info", "analyzed", "def_var", "type", "expanded"}  # no part of the text


def _calls(function: nodes.FuncDef) -> list[nodes.CallExpr]:
    """In the order in which they are read: arguments before the call itself."""
    found: list[nodes.CallExpr] = []
    todo: list[object] = [function.body]
    met: set[int] = set()
    while todo:
        each = todo.pop()
        if isinstance(each, list | tuple):
            todo += each
        elif isinstance(each, nodes.Statement | nodes.Expression | nodes.Block) and id(each) not in met:
            met.add(id(each))
            if isinstance(each, nodes.CallExpr):
                found.append(each)
            todo += [getattr(each, name, None) for name in set(type(each).__mypyc_attrs__) - ELSEWHERE]
    return sorted(found, key=lambda call: (call.end_line or 0, call.end_column or 0))


def _classes(modules: dict[str, nodes.MypyFile]) -> Iterator[nodes.TypeInfo]:
    for module in modules.values():
        for each in module.names.values():
            if isinstance(each.node, nodes.TypeInfo) and each.node.module_name == module.fullname:
                yield each.node


def classes(modules: dict[str, nodes.MypyFile]) -> tuple[set[str], set[str]]:
    """Those of the spec; and, with them, those that hold a part of it."""
    known = {each.fullname: each for each in _classes(modules)}
    fields = {name: set(_fields(each)) & set(known) for name, each in known.items()}
    parts = {name for name in known if name.rpartition(".")[2] in SPEC}
    while more := {part for name in parts for part in fields[name]} - parts:
        parts |= more
    return parts, parts | {name for name, held in fields.items() if held & parts}


def _fields(info: nodes.TypeInfo) -> Iterator[str]:
    for each in info.names.values():
        if isinstance(each.node, nodes.Var) and each.node.type is not None:
            yield from _names(each.node.type)


def load() -> build.BuildResult:
    """Every module of the package with its types."""
    os.chdir(ROOT)
    options = Options()
    parse_config_file(options, lambda: None, "pyproject.toml", sys.stdout, sys.stderr)
    options.incremental, options.export_types, options.preserve_asts = False, True, True
    return build.build(create_source_list(["distill"], options), options)


def trips() -> dict[str, Trip]:
    """One for each entry."""
    result = load()
    MODULES.update({name: tree for name, tree in result.files.items() if name.split(".")[0] == "distill"})
    found = {}
    for entry, (module, function) in ENTRIES.items():
        (home,) = [tree for name, tree in MODULES.items() if name.endswith(f".{module}") and function in tree.names]
        start = home.names[function].node
        start = start.func if isinstance(start, nodes.Decorator) else start
        assert isinstance(start, nodes.FuncDef)
        found[entry] = Trip(result.types, *classes(MODULES))
        found[entry].enter(start, home.fullname)
    return found


if __name__ == "__main__":
    for entry, trip in trips().items():
        rooms = len({name for name, _ in trip.arrivals})
        print(f"{entry}: {len(trip.arrivals)} arrivals in {rooms} modules, {trip.climbs} climbs")
        if "--show" in sys.argv:
            before: set[str] = set()
            last = ""
            for module, function in trip.arrivals:
                mark = "again" if module in before and module != last else ""
                print(f"  {mark:6}{function.removeprefix('distill.')}")
                before.add(module)
                last = module
