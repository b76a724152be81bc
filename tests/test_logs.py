"""Logs are read in blocks and printed from an offset, without characters that control a terminal."""

import tracemalloc
from pathlib import Path

import pytest
from commands import command
from runs import make_run

from distill.runs import log_files
from distill.runs.log_files import BLOCK, TAIL

LINES = [f"2026-11-25 17:{i // 60:02}:{i % 60:02}  teach  {'x' * (i % 300)}".encode() for i in range(3000)]


def log(folder: Path, content: bytes) -> Path:
    path = folder / "rank-0.log"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("count", [1, 2, 999, 2999, 3000, 5000])
def test_the_last_lines(tmp_path, count, end):
    content = b"\n".join(LINES) + end
    assert len(content) > 5 * BLOCK
    with log(tmp_path, content).open("rb") as file:
        place = log_files.last_lines(file, count)
    assert content[place:] == b"\n".join(LINES[-count:]) + end


def test_the_last_lines_of_an_empty_log(tmp_path):
    with log(tmp_path, b"").open("rb") as file:
        assert log_files.last_lines(file, 3) == 0


@pytest.mark.parametrize(("moment", "first"), [("2026-01-01 00:00:00", 0), ("2026-11-25 17:20:30", 1230)])
def test_what_came_since_a_moment(tmp_path, moment, first):
    content = b"\n".join(LINES)
    with log(tmp_path, content).open("rb") as file:
        assert content[log_files.first_since(file, moment) :] == b"\n".join(LINES[first:])
        assert log_files.first_since(file, "2999-01-01 00:00:00") == len(content)


def test_a_log_is_printed_from_a_place_to_its_end(tmp_path, capfd):
    path = log(tmp_path, b"\n".join(LINES))
    place = log_files.write(path, 0, unfinished=False)
    assert capfd.readouterr().out.encode() == b"\n".join(LINES[:-1]) + b"\n", "the last line may be half written"
    with path.open("ab") as file:
        file.write(b" more\nlast")
    place = log_files.write(path, place)
    assert capfd.readouterr().out.encode() == LINES[-1] + b" more\nlast"
    assert place == path.stat().st_size
    path.write_bytes(b"anew\n")
    assert log_files.write(path, place) == 5
    assert capfd.readouterr().out == "anew\n"


def test_a_terminal_obeys_nothing_of_a_log(tmp_path, capfd):
    path = log(tmp_path, b"\x1b[2Jgone\nbar 1\rbar 2\r\n\xff \xc3\xa9\n\x9b1m\n")
    log_files.write(path, 0)
    assert capfd.readouterr().out == "gone\nbar 1\nbar 2\n\ufffd \u00e9\n\ufffd1m\n"


def test_the_failure_at_the_end_of_a_log(tmp_path):
    before = b"2026-11-25 17:00:00  rank 3 failed:\nold\n"
    long = b"2026-11-25 17:00:01  teach  step\n" * (TAIL // 30)
    path = log(tmp_path, before + long + b"2026-11-25 18:00:00  rank 3 failed:\nTraceback\n  \x1b[31mhere\n")
    (failure,) = log_files.failures(path)
    assert (failure.time, failure.rank) == ("2026-11-25 18:00:00", 3)
    assert failure.text == "Traceback\n  \ufffd[31mhere\n"


def peak(path: Path, at: int) -> int:
    tracemalloc.start()
    log_files.write(path, at)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_log(tmp_path, capfd):
    line = b"2026-11-25 17:00:01  teach  1/2 images\n"
    few, many = (peak(log(tmp_path, line * count), 0) for count in (5_000, 50_000))
    assert many < 1.2 * few


def test_logs_prints_the_last_thousand_lines_unless_told_otherwise(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs", "one", "mixture-2d")
    run.logs.mkdir()
    content = b"".join(line + b"\n" for line in LINES)
    log(run.logs, content)
    head = "--- runs/one/logs/rank-0.log"
    whole = content.decode().splitlines()
    assert command(capfd, "logs", "one", "--lines", "0").out.splitlines() == [head, *whole]
    last = command(capfd, "logs", "one").out.splitlines()
    assert last == [f"{head}  (last 1,000 lines; use --lines 0 for the whole log)", *whole[-1000:]]
    few = command(capfd, "logs", "one", "-n", "2").out.splitlines()
    assert few == [f"{head}  (last 2 lines; use --lines 0 for the whole log)", *whole[-2:]]
    assert command(capfd, "logs", "one", "--since", "2026-11-25 17:00:10").out.splitlines() == [head, *whole[10:]]
    late = command(capfd, "logs", "one", "--since", "999999999d")
    assert late.code == 2
    assert late.err == ("error: --since 999999999d: must be 90s, 10m, 2h, 1d, or a time like 2026-11-25 17:40:00\n")
