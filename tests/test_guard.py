"""Text that reaches a terminal has no control characters."""

import pytest

from distill.core.text import printable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("naïve 中文 – ok", "naïve 中文 – ok"),
        ("\x1b[31mred\x1b[0m", "\ufffd[31mred\ufffd[0m"),
        ("a\rb\x07c\x9bd\x00e", "a\ufffdb\ufffdc\ufffdd\ufffde"),
        ("gpj.\u202eexe", "gpj.\ufffdexe"),
        ("bytes \udcff of a name", "bytes \ufffd of a name"),
        ("line\u2028break", "line\ufffdbreak"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(given, shown):
    assert printable(given) == shown
