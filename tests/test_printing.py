"""Output to a terminal, and the behaviour if nothing can be printed."""

import json
import logging
import os
import pty
import subprocess
import sys
import warnings

import pytest
from commands import command
from rich.table import Table
from runs import CARD, ENV, distill, make_run

from distill.core import printing
from distill.core.atomic import write_json
from distill.runs.progress import PlainLine
from distill.runs.run_store import append_event

RED = "\x1b[31mred\x07"
SHOWN = "\ufffd[31mred\ufffd"


def test_what_is_said_is_safe(capfd):
    printing.say(RED)
    printing.say_error(f"{RED} \udcff")
    PlainLine("stage").say(RED)
    out, err = capfd.readouterr()
    assert out == f"{SHOWN}\n"
    assert err.startswith(f"{SHOWN} \ufffd\n")
    assert err.endswith(f"  {SHOWN}\n")


def test_tables_show_what_they_are_given(capfd, monkeypatch):
    """Nothing in a cell, a head or a caption is an escape sequence or rich's markup."""
    monkeypatch.setenv("COLUMNS", "100")
    table = Table(title="[red]title[/red]", caption=RED)
    table.add_column(f"[bold]{RED}")
    table.add_row(":smile: [link=http://x]cell[/link]")
    printing.say_table(table)
    out = capfd.readouterr().out
    for said in ("[red]title[/red]", "[bold]\ufffd[31mred", ":smile: [link=http://x]cell[/link]"):
        assert said in out
    assert "\x1b" not in out and "\x07" not in out


def test_a_line_that_moves_shows_what_it_is_given():
    """On a terminal: there, escape sequences are rich's own, for the cursor and its colours."""
    theirs, ours = pty.openpty()
    code = (
        f"from distill.runs.progress import LiveLine as L; l = L('[red]a', 9); l.show(1, 'b [x] {RED}'); l.say({RED!r})"
    )
    code = code.replace("\x1b", "\\x1b").replace("\x07", "\\x07") + "; l.close()"
    done = subprocess.run([sys.executable, "-c", code], stderr=ours, env=ENV | {"TERM": "xterm"}, check=True)
    os.close(ours)
    said = b""
    while True:
        try:
            said += os.read(theirs, 65536)
        except OSError:  # all is read
            break
    assert done.returncode == 0
    assert "[red]a" in said.decode() and f"b [x] {SHOWN}" in said.decode()
    assert b"\x1b[31mred" not in said and b"\x07" not in said


def test_what_libraries_say_is_safe(capfd):
    printing.prepare()
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("library").addHandler(handler)
    logging.getLogger("library").error("key %s", RED)
    logging.getLogger("library").removeHandler(handler)
    assert capfd.readouterr().err == f"key {SHOWN}\n"
    assert SHOWN in warnings.formatwarning(RED, UserWarning, "file.py", 1)


def test_names_and_metrics_of_others_in_the_lists_of_runs(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")
    append_event(run, "started")
    append_event(run, "failed", message=f"{RED} no room")
    run.student("teach").mkdir(parents=True)
    write_json(
        run.student("teach") / "distill.json", CARD.model_dump(mode="json") | {"metrics": {"[bold]FD@1": 1.0}}
    )  # no RED: it is refused
    run.root.rename(tmp_path / "runs" / f"o{RED}ne")
    for arguments in (["list"], ["status"], ["show", f"o{RED}ne"], ["status", f"o{RED}ne"]):
        done = command(capfd, *arguments)
        assert done.code == 0, arguments
        assert f"o{SHOWN}ne" in done.out and "\x1b" not in done.out + done.err and "\x07" not in done.out
    assert f"failed: {SHOWN} no room" in done.out
    assert "student teach: [bold]FD@1 1" in done.out
    (listed,) = json.loads(command(capfd, "list", "--json").out)
    assert listed["message"] == f"{RED} no room", "JSON has escapes of its own"


@pytest.mark.parametrize(
    "arguments",
    [["list", f"--{RED}"], [f"{RED}"], ["show", f"{RED}"], ["sample", "x", f"--out={RED}", f"--steps={RED}"]],
    ids=["option", "command", "run", "value"],
)
def test_errors_show_no_escape_sequence_of_what_was_given(capfd, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    done = command(capfd, *arguments)
    assert done.code == 2
    assert "\x1b" not in done.err and "\x07" not in done.err


def test_a_log_is_shown_without_colours(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")
    run.logs.mkdir()
    run.log(1).write_bytes(b"\x1b[1mbold\x1b[0m\r\n10%\r20%\n\x1b]0;title\x07\n\xff\n")
    done = command(capfd, "logs", "one", "--rank", "1")
    assert done.out == "--- runs/one/logs/rank-1.log\nbold\n10%\n20%\n\ufffd]0;title\ufffd\n\ufffd\n"


# --- where nothing can be printed ---


@pytest.mark.process
def test_a_reader_that_leaves_is_no_error(tmp_path):
    shell = f"{sys.executable} -m distill recipes 2>errors | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "141\n"
    assert (tmp_path / "errors").read_text() == ""


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "where", "code", "said"),
    [
        ("recipes", ">&-", 0, ""),
        ("nope", "2>&-", 2, ""),
        ("recipes", ">/dev/full", 1, "error: No space left on device; what was saved is intact\n"),
        ("show nope", ">/dev/full", 2, "error: there is no run 'nope' in runs; the store is empty; "),
    ],
    ids=["closed stdout", "closed stderr", "full stdout", "error beside a full stdout"],
)
def test_closed_and_full_outputs(tmp_path, arguments, where, code, said):
    shell = f"{sys.executable} -m distill {arguments} {where}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.process
def test_an_output_that_has_not_every_letter(tmp_path):
    done = distill("show", "\u4e2d", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"}, fresh=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no run '\\u4e2d' in runs")
    env = {"PYTHONIOENCODING": "ascii:strict", "DISTILL_STORE": "\u4e2d"}
    done = distill("config", cwd=tmp_path, env=env, fresh=True)
    assert done.returncode == 0 and "\\u4e2d" in done.stdout


@pytest.mark.process
def test_a_traceback_is_safe_too(tmp_path):
    recipe = '"""A recipe (X 2020, arXiv 2001.00001)."""\n'
    recipe += "from recipes.pretrain.flow_matching import Config as Ours, Recipe\n"
    recipe += f"class Config(Ours):\n    @property\n    def needs(self):\n        raise ZeroDivisionError({RED!r})\n"
    (tmp_path / "mine.py").write_text(recipe)
    spec = "{name: a, stages: {t: {kind: train, recipe: ./mine.py, images: 8}}}"
    (tmp_path / "s.yaml").write_text(spec)
    done = distill("plan", "s.yaml", cwd=tmp_path, fresh=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith(f"ZeroDivisionError: {SHOWN}\n")
