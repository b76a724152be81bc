"""Writes the generated parts of recipes/README.md: python -m tests.programs.catalogue"""

import re
from pathlib import Path

from distill.spec import registry
from distill.teachers import overview

README = registry.package_folder() / "README.md"


def table() -> str:
    """All recipes, from their docstrings."""
    lines = ["| recipe | what it is | may need | cost of an update |", "|---|---|---|---:|"]
    for name in registry.names():
        found = registry.describe(name, Path())
        assert found.cost is not None, f"{name} has no cost yet; run: python -m tests.benchmarks recipes"
        lines.append(f"| `{name}` | {found.summary} | {', '.join(found.needs)} | {found.cost:g} |")
    return "\n".join(lines) + "\n"


def teachers() -> str:
    """All supported teachers, from the attributes of their conventions and architectures."""
    lines = ["| " + " | ".join(overview.HEADERS) + " |", "|---" * len(overview.HEADERS) + "|"]
    for row in overview.supported():
        names = [", ".join(map(_code, each)) for each in (row.networks, row.pipelines)]
        lines.append("| " + " | ".join([row.title, *names, row.prediction, row.conditions, row.guidance]) + " |")
    return "\n".join(lines) + "\n"


def _code(name: str) -> str:
    return f"`{name}`" if name.isidentifier() else name


def generated(text: str) -> str:
    """The text of README.md with its generated parts as they should be."""
    for name, content in {"recipes": table(), "teachers": teachers()}.items():
        text = _replaced(text, rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", f"\n{content}\n")
    return text


def _replaced(text: str, pattern: str, content: str) -> str:
    """The text with `content` between the two groups of `pattern`, which must match in exactly one place."""
    text, count = re.subn(pattern, lambda found: found[1] + content + found[2], text, flags=re.DOTALL)
    assert count == 1, f"{README} has {count} places that match {pattern!r} instead of 1"
    return text


if __name__ == "__main__":
    README.write_text(generated(README.read_text()))
