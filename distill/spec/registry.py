"""Finds recipes by name: a file of the package `recipes`, an entry point of the group `distill.recipes`, or ./file.py
next to the spec. Recipes need no registration, and listing them imports none of them.

A file of `recipes` whose name begins with an underscore is not a recipe: it has code that the recipes of its folder
share.
"""

import ast
import functools
import importlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange, middle
from distill.core.importing import Importing
from distill.core.text import suggest
from distill.spec import schema

GROUP = "distill.recipes"
PARTS = ("Config", "Recipe")
COSTS = "costs.json"  # file in the package `recipes` with the cost of each of its recipes; written by tests/benchmarks
NEEDS = ("data", "pairs", "states", "teacher", "weights", "jvp")
_FOREIGN: set[str] = set()  # files of the loaded recipes that are not in the package `recipes`


@dataclass(frozen=True)
class Option:
    """An option of a recipe, read from its source."""

    name: str
    type: str
    choices: list[str]
    """the valid words, for a Literal; else empty"""
    default: Any
    """None also for a required option"""
    meaning: str


@dataclass(frozen=True)
class Description:
    """The description of a recipe, read from its source without importing it."""

    name: str
    summary: str
    paper: str
    """the docstring of its module"""
    needs: list[str]
    options: list[Option]
    cost: float | None
    """time per update of the student, relative to flow matching; None: not measured"""


@runtime_checkable
class RecipeConfig(Protocol):
    """The properties that the Config of every recipe has. They may depend on its options."""

    @property
    def needs(self) -> frozenset[str]: ...  # a subset of NEEDS
    @property
    def student(self) -> str: ...  # kind of the student, a key of `kinds.STUDENTS`


@runtime_checkable
class Guiding(Protocol):
    """A Config that distils a teacher with classifier-free guidance."""

    @property
    def guidance_scale(self) -> float | GuidanceRange: ...  # 1 = none


def guidance_scale(config: RecipeConfig) -> float:
    """Classifier-free guidance scale with which a recipe calls its teacher; 1 = none. Of a range, the middle."""
    given = config.guidance_scale if isinstance(config, Guiding) else 1.0
    return middle(given) if isinstance(given, tuple) else given


def guidance_range(config: RecipeConfig) -> GuidanceRange | None:
    """The range of guidance scales that the student takes as an input; None: it has one scale, or is not guided."""
    given = config.guidance_scale if isinstance(config, Guiding) else 1.0
    return given if isinstance(given, tuple) else None


@runtime_checkable
class Synchronised(Protocol):
    """A Config whose option `guidance_sync` drops the condition for the teacher too, where the student's is dropped."""

    @property
    def guidance_sync(self) -> bool: ...


def unconditional(config: RecipeConfig) -> bool:
    """Whether the student learns the unconditional velocity.

    It does if it trains on data alone, or if the condition is dropped for its teacher as well (`guidance_sync`).
    """
    return "teacher" not in config.needs or (isinstance(config, Synchronised) and config.guidance_sync)


@runtime_checkable
class Dropping(Protocol):
    """A Config with the probability of dropping the condition of a sample in training."""

    @property
    def label_dropout(self) -> float: ...


def drops_condition(config: RecipeConfig) -> bool:
    """Whether the student is also trained without condition."""
    return isinstance(config, Dropping) and config.label_dropout > 0


@runtime_checkable
class Coupling(Protocol):
    """A Config whose loss couples blocks of consecutive samples of the global batch. A block must not be split."""

    @property
    def rows_together(self) -> int: ...  # samples per block; 1: no coupling


def rows_together(config: RecipeConfig) -> int:
    """The size of a micro-batch must be a multiple of this."""
    return config.rows_together if isinstance(config, Coupling) else 1


def package_folder() -> Path:
    """The folder of the package `recipes`, found without importing it. InputError if it is not installed."""
    found = importlib.util.find_spec("recipes")
    if found is None or not found.submodule_search_locations:
        raise InputError("the package `recipes` is missing from this installation; install distill again")
    return Path(next(iter(found.submodule_search_locations)))


def names() -> list[str]:
    """The names of all installed recipes; ./file.py recipes are not listed."""
    folder = package_folder()
    files = [path for path in sorted(folder.glob("*/*.py")) if not path.name.startswith("_")]
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files] + sorted(_entry_points())


def own_file(name: str, base: Path) -> Path | None:
    """The file of a recipe ./file.py in the folder of the spec; None if the name is not such a path.

    Raises InputError if the file does not exist or is outside of that folder.
    """
    if not name.endswith(".py"):
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(
            f"recipe '{name}': a recipe of your own must be in the folder of its spec or below; write ./file.py"
        )
    path = base / name
    if not path.is_file():
        raise InputError(f"recipe '{name}': there is no file {path}")
    return path


def source(name: str, base: Path) -> Path:
    """The file of a recipe, found without importing it. InputError if there is no such recipe."""
    own = own_file(name, base)
    if own is not None:
        return own
    path = package_folder() / f"{name}.py"
    if name.count("/") == 1 and path.is_file():
        if path.name.startswith("_"):
            family = path.parent.name
            valid = ", ".join(each for each in names() if each.startswith(f"{family}/"))
            raise InputError(f"{name} is not a recipe, but code shared by the recipes of {family}; valid: {valid}")
        return path
    point = _entry_points().get(name)
    if point is None:
        last = [each for each in names() if each.rpartition("/")[2] == name]  # given without its folder
        hint = suggest(last[0] if last else name, names())
        raise InputError(f"there is no recipe '{name}'; {hint}; for a recipe of your own, give its file: ./file.py")
    found = importlib.util.find_spec(point.module)
    if found is None or found.origin is None:
        raise InputError(f"recipe '{name}': its module {point.module} is not installed")
    return Path(found.origin)


def load(name: str, base: Path) -> ModuleType:
    """Import the module of a recipe. InputError if the import fails or its docstring, Config or Recipe is missing."""
    path = source(name, base)
    is_ours = path.is_relative_to(package_folder())
    if not is_ours:
        _refuse_shared(name, path)
    with Importing(f"recipe '{name}'", path.absolute()):
        if name.endswith(".py"):
            module = _load_file(path)
        else:
            point = _entry_points().get(name)
            module = importlib.import_module(
                f"recipes.{name.replace('/', '.')}" if is_ours or point is None else point.module
            )
    if not is_ours and module.__file__ is not None:
        _FOREIGN.add(module.__file__)
    missing = [part for part in PARTS if part not in vars(module)]
    if missing or not module.__doc__:
        what = " and ".join(f"class {part}" for part in missing) or "docstring; add one that names its paper"
        raise InputError(f"recipe '{name}' ({path}) has no {what}")
    if "sampler" not in dir(module.Recipe):
        raise InputError(f"recipe '{name}' ({path}): its class Recipe sets no sampler; add sampler = \"euler\"")
    return module


def _refuse_shared(name: str, path: Path) -> None:
    """Raise InputError if a user's recipe imports the shared private modules of the package `recipes`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # importing it will report the error
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for imported in (package + alias.name for alias in node.names):
            if re.match(r"recipes\.(\w+\.)*_", imported):
                raise InputError(
                    f"recipe '{name}' ({path}, line {node.lineno}): {imported} is private to the recipes of its folder "
                    "and may change; copy the code that you need into your file"
                )


def is_of_foreign_recipe(error: BaseException) -> bool:
    """Whether an error was raised in a recipe outside of the package `recipes`, so that its author must fix it."""
    return any(each.filename in _FOREIGN for each in traceback.extract_tb(error.__traceback__))


def configure(name: str, module: ModuleType, options: dict[str, Any], where: str) -> RecipeConfig:
    """The Config of a recipe from its options, validated strictly. InputError with one line per mistake."""
    model: type[BaseModel] = module.Config
    try:
        config = model.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        raise InputError("\n  ".join(schema.explain(error, model, options, where))) from None
    if not isinstance(config, RecipeConfig):
        raise InputError(
            f"recipe '{name}': its class Config must have the properties needs and student, as reflow/reflow does"
        )
    return config


def describe(name: str, base: Path) -> Description:
    """The description of a recipe, from its source."""
    path = source(name, base)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    paper = ast.get_docstring(tree) or ""
    config = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    bases = config.bases if config is not None else []
    bodies = [*(_body_of_base(base, path.parent) for base in bases), config.body if config is not None else []]
    options = {option.name: option for body in bodies for option in _options(body)}
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    needs = _needs([node for node in functions if node.name == "needs"])
    return Description(name, paper.split("\n")[0], paper, needs, list(options.values()), _costs().get(name))


def _costs() -> dict[str, float]:
    return json.loads((package_folder() / COSTS).read_text(encoding="utf-8"))


def _load_file(path: Path) -> ModuleType:
    """Import a module from a file, once per content. It is added to sys.modules, where pydantic looks up its names."""
    content = path.read_bytes()
    name = f"distill_recipe_{sha256(content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, path
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        # The usual loader is not used. It writes __pycache__ next to the file, and would reuse that for a new version
        # of the file that was saved within the same second.
        exec(compile(content, path, "exec"), vars(module))
    finally:
        if sys.exception() is not None:
            del sys.modules[name]
    return module


def _entry_points() -> dict[str, EntryPoint]:
    return _entry_points_on(tuple(sys.path))


@functools.cache
def _entry_points_on(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """path: sys.path. The result is cached, since reading the entry points of all packages takes milliseconds."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _needs(properties: Sequence[ast.FunctionDef]) -> list[str]:
    """What the last of these `needs` properties may return. One that calls super() adds to those before it."""
    found: set[object] = set()
    for each in reversed(properties):
        nodes = list(ast.walk(each))
        found |= {node.value for node in nodes if isinstance(node, ast.Constant)}
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in nodes):
            break
    return [need for need in NEEDS if need in found]


def _body_of_base(base: ast.expr, family: Path) -> list[ast.stmt]:
    """The body of a class that a Config inherits from, `base`, written module.Class, after those of its own bases.

    The module is in distill.flow or in the recipe's folder. Its own bases are found if they are in the same module.
    """
    if not isinstance(base, ast.Attribute) or not isinstance(base.value, ast.Name):
        return []
    shared = base.value.id.startswith("_")
    path = (family if shared else Path(__file__).parents[1] / "flow") / f"{base.value.id}.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return _body({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}, base.attr)


def _body(classes: Mapping[str, ast.ClassDef], name: str) -> list[ast.stmt]:
    """The statements of a class, after those of its bases. Classes that are not among `classes` have none."""
    if name not in classes:
        return []
    bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    return [statement for base in bases for statement in _body(classes, base)] + classes[name].body


def _options(body: Sequence[ast.stmt]) -> list[Option]:
    found = []
    for statement, after in zip_longest(body, body[1:]):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            meaning = " ".join(after.value.value.split())
        name, type_name = statement.target.id, ast.unparse(statement.annotation)
        found.append(Option(name, type_name, _choices(statement.annotation), _value(statement.value), meaning))
    return found


def _choices(annotation: ast.expr) -> list[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            return [str(word.value) for word in ast.walk(node.slice) if isinstance(word, ast.Constant)]
    return []


def _value(node: ast.expr | None) -> Any:  # noqa: ANN401
    """The value of a default; if it is not a literal, its source text."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
