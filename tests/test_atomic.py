"""Files and folders appear complete or not at all: errors, full disks, kills at any moment, many processes at once."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from distill.core import atomic
from distill.core.atomic import new_folder, write_atomic, write_files
from distill.core.errors import RunError
from distill.core.owners import Owner

PREAMBLE = """
import os, resource, signal, sys, time
from pathlib import Path
from distill.core import atomic
from distill.core.atomic import new_folder, write_atomic, write_files
from distill.core.errors import RunError
path = Path(sys.argv[1])
"""


REPLACE = "with new_folder(path, replace=True) as new:\n    write_files(new, {'a': 'new', 'b/c': 'new'})\n"
# Fails between the two renames.
RENAME = """
rename = Path.rename
def fail(me, to):
    if ".tmp-" in me.name:
        {}
    rename(me, to)
Path.rename = fail
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def start(code, path):
    env = {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PREAMBLE + code, path], env=env, text=True, **pipes)


def fill(path, text, **options):
    with new_folder(path, **options) as new:
        write_files(new, {"a": text, "b/c": text.encode()})


def content(path):
    return {str(each.relative_to(path)): each.read_text() for each in path.rglob("*") if each.is_file()}


def whole(text):
    return {"a": text, "b/c": text}


def read(path):
    """What stands in the files of a folder that may be replaced, and removed, while it is read."""
    found = set()
    with suppress(FileNotFoundError):
        folder = os.open(path, os.O_RDONLY)
        for name in ("a", "b/c"):
            with suppress(FileNotFoundError), open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:  # noqa: PTH123
                found.add(file.read())
        os.close(folder)
    return found


def names(path):
    return sorted(each.name for each in path.iterdir())


# --- alone ---


def test_a_folder_appears_once_it_is_full_and_nothing_else_stays(tmp_path):
    target = tmp_path / "new" / "parents" / "x"
    with new_folder(target) as new:
        assert new.parent == target.parent and new.name.startswith(".x.tmp-") and not target.exists()
        assert Owner.of_label(new.name.split("-", 2)[2]) == Owner.this()
        write_files(new, {"a": "1", "b/c": b"1"})
    assert content(target) == whole("1")
    assert names(target.parent) == ["x"]


def test_what_is_there_is_replaced_only_if_asked(tmp_path):
    fill(tmp_path / "x", "old")
    with pytest.raises(OSError, match="Directory not empty"):
        fill(tmp_path / "x", "new")
    assert content(tmp_path / "x") == whole("old") and names(tmp_path) == ["x"]
    fill(tmp_path / "x", "new", replace=True)
    fill(tmp_path / "y", "new", replace=True)
    assert content(tmp_path / "x") == content(tmp_path / "y") == whole("new")
    assert names(tmp_path) == ["x", "y"]


def test_a_link_that_is_replaced_leaves_its_target_alone(tmp_path):
    fill(tmp_path / "elsewhere", "old")
    (tmp_path / "x").symlink_to("elsewhere")
    fill(tmp_path / "x", "new", replace=True)
    assert not (tmp_path / "x").is_symlink() and content(tmp_path / "x") == whole("new")
    assert content(tmp_path / "elsewhere") == whole("old") and names(tmp_path) == ["elsewhere", "x"]


@pytest.mark.parametrize("given", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, given):
    fill(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", replace=given) as new:
        write_files(new, {"a": "new"})
        raise ZeroDivisionError
    assert content(tmp_path / "x") == whole("old") and names(tmp_path) == ["x"]


def test_what_was_moved_aside_comes_back_if_the_new_one_cannot_take_its_place(tmp_path):
    fill(tmp_path / "x", "old")
    code = RENAME.format("raise OSError(5, 'Input/output error')")
    assert start(code + REPLACE, tmp_path / "x").communicate(timeout=60)[1].endswith("Input/output error\n")
    assert content(tmp_path / "x") == whole("old") and names(tmp_path) == ["x"]


def test_names_as_long_as_a_file_system_takes_do_not_mix(tmp_path):
    for one, other in (("n" * 254 + "1", "n" * 254 + "2"), ("ä" * 127, "ä" * 126 + "é")):
        for name in (one, other):
            fill(tmp_path / name, "old")
            fill(tmp_path / name, name, replace=True)
        (tmp_path / one).rename(atomic.hidden(tmp_path / one, "old"))
        fill(tmp_path / other, "new", replace=True)
        assert not (tmp_path / one).exists(), "what is aside is not the other's, and its process is alive"
        write_atomic(tmp_path / one, "file")
        assert (tmp_path / one).read_text() == "file" and content(tmp_path / other) == whole("new")


def test_whoever_is_first_stays(tmp_path):
    write_atomic(tmp_path / "x", "first", replace=False)
    write_atomic(tmp_path / "x", "second", replace=False)
    assert (tmp_path / "x").read_text() == "first" and names(tmp_path) == ["x"]
    with pytest.raises(RunError, match=r"^cannot write .*/no/x: No such file or directory; nothing was changed$"):
        write_atomic(tmp_path / "no" / "x", "first", replace=False)


# --- the disk ---


@pytest.mark.skipif(not Path("/proc/sys").exists(), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="/proc/sys"), new_folder(Path("/proc/sys/x")):
        pytest.fail("there is nothing to fill")
    with pytest.raises(RunError, match=r"^cannot write /proc/sys/x: .*; nothing was changed$"):
        write_atomic(Path("/proc/sys/x"), "new")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    fill(tmp_path / "x", "old")
    write_atomic(tmp_path / "file", "old")
    process = start(
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for replace in (True, False):
    try:
        with new_folder(path / "x", replace=replace) as new:
            write_files(new, {"a": "new", "b/c": b"x" * 1001})
    except OSError as error:
        print(error.strerror)
try:
    write_atomic(path / "file", b"x" * 1001)
except RunError as error:
    print(error)
""",
        tmp_path,
    )
    out, err = process.communicate(timeout=60)
    said = f"cannot write {tmp_path}/file: File too large; nothing was changed"
    assert (out.splitlines(), err) == (["File too large", "File too large", said], "")
    assert content(tmp_path) == {"x/a": "old", "x/b/c": "old", "file": "old"} and names(tmp_path) == ["file", "x"]


# --- interrupted ---


def test_ctrl_c_leaves_what_was_there(tmp_path):
    fill(tmp_path / "x", "old")
    process = start(
        "with new_folder(path, replace=True):\n    print(flush=True)\n    time.sleep(100)\n", tmp_path / "x"
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("KeyboardInterrupt\n")
    assert content(tmp_path / "x") == whole("old") and names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        (f"atomic.sync_tree = lambda folder: {DIE}", "old"),  # it is full
        (f"Path.rename = lambda me, to: {DIE}", "old"),
        (RENAME.format(DIE), "old"),
        (f"atomic.sync = lambda each: {DIE} if each == path.parent else None", "new"),
        (f"remove = atomic._remove\natomic._remove = lambda aside: (remove(aside / 'a'), {DIE})", "new"),
    ],
    ids=["full", "durable", "between the renames", "renamed", "the old one half removed"],
)
def test_a_kill_at_any_moment_leaves_a_whole_folder_and_the_next_use_clears_up(tmp_path, moment, after):
    fill(tmp_path / "x", "old")
    process = start(f"{moment}\n{REPLACE}", tmp_path / "x")
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", replace=True):
        assert content(tmp_path / "x") == whole(after)
        raise ZeroDivisionError
    assert content(tmp_path / "x") == whole(after) and names(tmp_path) == ["x"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "x", "old")
    assert (
        start(f"os.fsync = lambda file: {DIE}\nwrite_atomic(path, 'new')\n", tmp_path / "x").wait(60) == -signal.SIGKILL
    )
    assert (tmp_path / "x").read_text() == "old" and len(names(tmp_path)) == 2
    atomic.clear_up(tmp_path, "y")
    assert len(names(tmp_path)) == 2, "it is not of that name"
    atomic.clear_up(tmp_path)
    assert names(tmp_path) == ["x"]


def test_what_a_process_of_another_host_writes_is_left_for_a_day(tmp_path):
    elsewhere = replace(Owner.this(), host="elsewhere", boot="another").label
    left = tmp_path / f".x.tmp-0123abcd-{elsewhere}"
    write_files(left, {"b/c": "1"})
    fill(tmp_path / "x", "new")
    for path in (left, left / "b"):
        os.utime(path, (0, 0))
    fill(tmp_path / "x", "newer", replace=True)
    assert left.exists(), "a file was written lately"
    os.utime(left / "b" / "c", (0, 0))
    fill(tmp_path / "x", "newest", replace=True)
    assert names(tmp_path) == ["x"]


def test_what_a_process_of_another_host_moved_aside_comes_back_at_once(tmp_path):
    fill(tmp_path / "x", "old")
    elsewhere = replace(Owner.this(), host="elsewhere", boot="another").label
    (tmp_path / "x").rename(tmp_path / f".x.old-0123abcd-{elsewhere}")
    mine = tmp_path / ".x.old-2024"
    mine.touch()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", replace=True):
        assert content(tmp_path / "x") == whole("old")
        raise ZeroDivisionError
    assert content(tmp_path / "x") == whole("old") and names(tmp_path) == [mine.name, "x"]


def test_what_the_only_writer_of_a_folder_finds_unfinished_is_removed_at_once(tmp_path):
    strangers = [".x", ".x.tmp", "x.tmp-1", ".x.old.tmp-a"]
    for name in (".x.tmp-1", ".y.tmp-1", atomic.hidden(tmp_path / "x").name, *strangers):
        (tmp_path / name).touch()
    fill(atomic.hidden(tmp_path / "x"), "1")
    atomic.remove_unfinished(tmp_path, lambda name: name == "x")
    assert names(tmp_path) == sorted([".y.tmp-1", *strangers])
    atomic.remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(strangers)


# --- several processes ---


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    code = "with new_folder(path, replace=True) as new:\n    print(new, flush=True)\n    input()\n"
    code += "    write_files(new, {'a': 'theirs', 'b/c': 'theirs'})\n"
    process = start(code, tmp_path / "x")
    theirs = Path(process.stdout.readline().strip())
    fill(tmp_path / "x", "ours", replace=True)
    assert theirs.is_dir() and content(tmp_path / "x") == whole("ours")
    assert process.communicate("\n", timeout=60) == ("", "")
    assert content(tmp_path / "x") == whole("theirs") and names(tmp_path) == ["x"]


def test_of_two_at_once_one_makes_it(tmp_path):
    code = """
with new_folder(path) as new:
    write_files(new, {"a": str(os.getpid()), "b/c": str(os.getpid())})
    print(flush=True)
    input()
"""
    two = [start(code, tmp_path / "x") for _ in range(2)]
    for process in two:
        process.stdout.readline()
    said = [process.communicate("\n", timeout=60)[1] for process in two]
    assert [process.returncode for process in two] == [0, 1]
    assert said[0] == "" and "Directory not empty" in said[1].splitlines()[-1]
    assert content(tmp_path / "x") == whole(str(two[0].pid)) and names(tmp_path) == ["x"]


def test_two_that_replace_one_folder_again_and_again_never_leave_a_part_of_it(tmp_path):
    code = """
print(flush=True)
input()
for turn in range(100):
    text = f"{os.getpid()} {turn}"
    try:
        with new_folder(path, replace=True) as new:
            write_files(new, {"a": text, "b/c": text})
    except OSError as error:  # the other was faster
        if error.strerror != "Directory not empty":
            raise
"""
    two = [start(code, tmp_path / "x") for _ in range(2)]
    for process in two:
        process.stdout.readline()
    for process in two:
        process.stdin.write("\n")
        process.stdin.flush()
    while any(process.poll() is None for process in two):
        seen = read(tmp_path / "x")
        assert len(seen) <= 1, f"parts of different ones: {seen}"
        time.sleep(0.001)
    assert [process.communicate()[1] for process in two] == ["", ""]
    last = (tmp_path / "x" / "a").read_text()
    assert content(tmp_path / "x") == whole(last) and last.split()[0] in {str(process.pid) for process in two}
    assert names(tmp_path) == ["x"]
