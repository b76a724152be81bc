"""A curve of any length is drawn with two thousand points that look the same, and is read with bounded memory."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from runs import make_run

from distill.evaluation import curves, report_page
from distill.evaluation.curves import KEPT, POINTS, Thinned, thin
from distill.runs.run_store import CREATED, RunPaths, append_event


def wave(count: int) -> tuple[list[float], list[float]]:
    at = [float(i) for i in range(count)]
    return at, [math.sin(i / 5000) + 0.1 * (i % 7) for i in range(count)]


def test_few_points_stay_as_they_are():
    at, values = wave(POINTS)
    curve = Thinned()
    for each in zip(at, values, strict=True):
        curve.add(*each)
    assert curve.drawn() == (at, values)


def test_each_part_of_the_range_keeps_its_smallest_and_its_largest_value():
    at, values = wave(50_000)
    values[31_337], values[41_000] = 9.0, -9.0
    kept_at, kept = thin(at, values, POINTS)
    assert len(kept_at) == len(kept) <= POINTS
    assert kept_at == sorted(set(kept_at))
    assert all(values[int(place)] == value for place, value in zip(kept_at, kept, strict=True))
    parts = np.array(values).reshape(POINTS // 2, -1)  # 50 points each
    assert 9.0 in kept and -9.0 in kept
    inside = [[v for p, v in zip(kept_at, kept, strict=True) if 50 * i <= p < 50 * i + 50] for i in (3, 500, 998)]
    for i, each in zip((3, 500, 998), inside, strict=True):
        assert (min(each), max(each)) == pytest.approx((parts[i].min(), parts[i].max()), abs=0.2)


def test_a_curve_that_was_thinned_again_and_again_keeps_its_outline():
    curve = Thinned()
    at, values = wave(100_000)
    values[777], values[99_998] = 50.0, -50.0
    most = 0
    for each in zip(at, values, strict=True):
        curve.add(*each)
        most = max(most, len(curve.at))
    assert most <= KEPT
    drawn_at, drawn = curve.drawn()
    assert len(drawn) <= POINTS
    assert (drawn[drawn_at.index(777)], drawn[drawn_at.index(99_998)]) == (50.0, -50.0)
    for low in range(0, 100_000, 10_000):
        inside = [value for place, value in zip(drawn_at, drawn, strict=True) if low <= place < low + 10_000]
        true = values[low : low + 10_000]
        assert (min(inside), max(inside)) == pytest.approx((min(true), max(true)), abs=0.1)


def test_a_resumed_run_goes_back_and_what_cannot_be_drawn_is_left_out():
    curve = Thinned()
    for at, value in [(1, 1.0), (2, 9.0), (3, 9.0), (2, 2.0), (4, math.nan), (5, math.inf), (6, 1e300), (7, 7.0)]:
        curve.add(float(at), value)
    assert curve.drawn() == ([1, 2, 7], [1.0, 2.0, 7.0])


def noted(run: RunPaths, count: int) -> RunPaths:
    line = {"time": 1.0, "event": "progress", "label": "reflow", "unit": "images", "total": count}
    with (run.root / CREATED).open("a") as file:
        file.writelines(json.dumps(line | {"done": i, "logs": {"loss": 1 / (i + 1)}}) + "\n" for i in range(count))
    return run


def test_memory_of_a_report_does_not_grow_with_the_events(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "KEPT", 400)
    monkeypatch.setattr(curves, "POINTS", 100)
    peaks = []
    for count in (2_000, 10_000):
        run = noted(make_run(tmp_path, str(count), "mixture-2d"), count)
        tracemalloc.start()
        report_page._events(run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_report_of_many_warnings_shows_the_first_hundred(tmp_path):
    run = make_run(tmp_path, "one", "mixture-2d")
    for number in range(2 * report_page.MAX_WARNINGS):
        append_event(run, "warning", label="reflow", text=f"number {number // 2}.")
    _, _, warnings = report_page._events(run)
    assert warnings == [f"reflow: number {n}." for n in range(100)]
    append_event(run, "warning", label="reflow", text="another")
    append_event(run, "warning", label="reflow", text="and another")
    assert report_page._events(run)[2][100:] == ["more warnings: see events/"]


def test_nothing_foreign_becomes_part_of_the_page(tmp_path):
    run = make_run(tmp_path, "one", "mixture-2d")
    evil = "<script>alert(1)</script>"
    append_event(run, "progress", label="reflow", unit=evil, done=1, total=2, logs={f"loss {evil} $\\frac{{$": 1.0})
    append_event(run, "warning", label=evil, text='"><img src=x onerror=alert(1)>')
    run.env.write_text(json.dumps({"platform": evil, "packages": {"torch": evil}}))
    page = report_page.write(run).read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") == 4  # its amount, the warning, the platform, the version
