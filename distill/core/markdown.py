"""Text from elsewhere, as Markdown that shows it and nothing more: no markup, HTML, link or table cell."""

import re

from distill.core.text import printable

# What Markdown (GitHub's, with its tables, links and mathematics) gives a meaning within a line, and HTML everywhere.
MARKUP = re.compile(r"""[\\`*\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|\.(?<=www\.)""", re.IGNORECASE)
# What has a meaning where a line begins: headings, lists, rules, quotes.
BEGINNING = re.compile(r"^([#+=-]|\d+(?=[.)]))")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "$": "&#36;"}
PLAIN = re.compile(r"[A-Za-z0-9_./ -]+")


def escape(text: str) -> str:
    """One line that Markdown shows as it is, in a paragraph, a heading or a cell of a table."""
    line = " ".join(printable(text).split())
    line = MARKUP.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), line)
    return BEGINNING.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", line)


def code(text: str) -> str:
    """A name as code; one that is no plain name, as text."""
    return f"`{text}`" if PLAIN.fullmatch(text) else escape(text)
