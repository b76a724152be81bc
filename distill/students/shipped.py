"""The code in student folders, as text: `pipeline.py`, and one file for a network that diffusers does not have.

Each file is self-contained: instead of importing a sampler or another network, it contains its text. There are two
reasons. From a hub, diffusers downloads only one code file for the pipeline and one for the network. And Python reuses
a module that was imported by a relative import from one folder for all folders loaded later.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

STUDENTS_DIR = Path(__file__).parent
SAMPLERS_DIR, NETWORKS_DIR = STUDENTS_DIR / "samplers", STUDENTS_DIR.parent / "networks"
# Networks that diffusers does not have: class -> the module that is shipped with the weights.
NETWORKS = {
    "VelocityMLP": "velocity_mlp",
    "VelocityUNet2DModel": "velocity_unet",
    "VelocityEdmUNet2DModel": "velocity_edm",
    "FlowMapMLP": "flow_map_mlp",
    "FlowMapUNet2DModel": "flow_map_unet",
    "FlowMapEdmUNet2DModel": "flow_map_edm",
    "PolicyMLP": "policy_mlp",
    "PolicyUNet2DModel": "policy_unet",
    "AccelerationMLP": "acceleration_mlp",
    "AccelerationUNet2DModel": "acceleration_unet",
}


def network(module: str) -> str:
    """The text of a network's file, with the text of the network that it imports in place of the import."""
    text = (NETWORKS_DIR / f"{module}.py").read_text()
    return re.sub(r"^from \.(\w+) import [\w, ]+\n", lambda found: network(found[1]), text, flags=re.MULTILINE)


def pipeline(kind: str, sampler: str) -> str:
    """The text of pipeline.py for a student of this kind with this sampler."""
    return joined(STUDENTS_DIR / "pipeline.py", [SAMPLERS_DIR / f"{sampler}.py", NETWORKS_DIR / f"{kind}_call.py"])


def scheduler() -> str:
    """The text of linear_path_scheduler.py."""
    return joined(STUDENTS_DIR / "linear_path_scheduler.py", [NETWORKS_DIR / "linear_path.py"])


def second_time() -> str:
    """The text of second_time.py."""
    return joined(NETWORKS_DIR / "second_time.py", [NETWORKS_DIR / "guidance_input.py"])


def flow_map_pipeline() -> str:
    """The text of flow_map_pipeline.py."""
    return (STUDENTS_DIR / "flow_map_pipeline.py").read_text()


def joined(module: Path, parts: Sequence[Path]) -> str:
    """The text of one module that contains several.

    It consists of the docstring of `module`, all imports except those from distill or the same folder, the code of each
    part with its docstring as a comment above it, and the code of `module`.
    """
    main, *others = files = [_read(path) for path in (module, *parts)]
    sections = [f'"""{main.docstring}"""', _imports([line for each in files for line in each.imports])]
    for each in others:
        comment = "\n".join(f"# {line}".rstrip() for line in each.docstring.strip().splitlines())
        sections.append(f"{comment}\n{each.code}\n")
    return "\n\n".join([*sections, main.code]) + "\n"


@dataclass(frozen=True)
class _File:
    docstring: str
    imports: Sequence[ast.Import | ast.ImportFrom]
    code: str  # everything after the imports


@cache
def _read(path: Path) -> _File:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    docstring, after = ast.get_docstring(tree, clean=False), imports[-1].end_lineno
    assert docstring is not None, f"{path} has no docstring"
    return _File(docstring, imports, "\n".join(text.splitlines()[after:]).strip())


def _imports(statements: Sequence[ast.Import | ast.ImportFrom]) -> str:
    """The import statements without duplicates, sorted like ruff sorts them, the standard library first."""
    lines: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    for statement in statements:
        given = {ast.unparse(name) for name in statement.names}
        if isinstance(statement, ast.Import):
            lines |= {f"import {name}" for name in given}
        elif statement.module and statement.level == 0 and not statement.module.startswith("distill."):
            names[statement.module] |= given
    lines |= {f"from {module} import {', '.join(sorted(given))}" for module, given in names.items()}

    def place(line: str) -> tuple[bool, bool, str]:
        return re.split("[ .]", line)[1] not in sys.stdlib_module_names, line.startswith("from"), line

    blocks = groupby(sorted(lines, key=place), key=lambda line: place(line)[0])
    return "\n\n".join("\n".join(block) for _, block in blocks)
