"""Escapes untrusted text for Markdown, so that it cannot add markup, HTML, links or table cells."""

import re

from distill.core.text import printable

# Characters with a meaning within a line of Markdown (GitHub's dialect, with tables, links and formulas) or HTML.
MARKUP = re.compile(r"""[\\`*\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|\.(?<=www\.)""", re.IGNORECASE)
# Characters with a meaning at the beginning of a line: headings, lists, rules.
BEGINNING = re.compile(r"^([#+=-]|\d+(?=[.)]))")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "$": "&#36;"}
PLAIN = re.compile(r"[A-Za-z0-9_./ -]+")


def escape(text: str) -> str:
    """The text as one escaped line, for a paragraph, a heading or a table cell."""
    line = " ".join(printable(text).split())
    line = MARKUP.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), line)
    return BEGINNING.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", line)


def code(text: str) -> str:
    """The text as inline code, or escaped if it contains characters that are not safe in code."""
    return f"`{text}`" if PLAIN.fullmatch(text) else escape(text)
