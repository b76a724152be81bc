"""Writes the generated parts of recipes/README.md: python -m tests.programs.catalogue"""

import re
from pathlib import Path

from distill.spec import registry

README = registry.package_folder() / "README.md"
SMALLEST = "reflow/reflow"


def table() -> str:
    """All recipes, from their docstrings."""
    lines = ["| recipe | what it is | can need | an update costs |", "|---|---|---|---:|"]
    for name in registry.names():
        found = registry.describe(name, Path())
        assert found.cost is not None, f"{name} has no cost yet; run: python -m tests.benchmarks recipes"
        lines.append(f"| `{name}` | {found.summary} | {', '.join(found.needs)} | {found.cost:g} |")
    return "\n".join(lines) + "\n"


def smallest() -> str:
    """The source of the smallest recipe."""
    return (registry.package_folder() / f"{SMALLEST}.py").read_text()


def generated(text: str) -> str:
    """The text of README.md with its generated parts as they should be."""
    text = re.sub(r"(<!-- recipes: [^\n]*-->\n).*?(<!-- end -->)", rf"\1\n{table()}\n\2", text, flags=re.DOTALL)
    return re.sub(
        r"(whole:\n\n```python\n).*?(```\n)", lambda found: found[1] + smallest() + found[2], text, flags=re.DOTALL
    )


if __name__ == "__main__":
    README.write_text(generated(README.read_text()))
