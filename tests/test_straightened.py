"""What is reported about rounds of reflow: in the terminal, in the report, and the warning if errors add up."""

import re

import pytest
from rich.console import Console
from test_report import Page, measured_row

from distill.core.atomic import write_json
from distill.evaluation import charts, report_page
from distill.evaluation.pictures import images_png
from distill.reports import rounds_table
from distill.runs.results import FILE_NAME, Results, card_metrics
from distill.runs.run_store import RunPaths, append_event


def evaluation(number: int, before: float | None, after: float | None, *, steps=(1, 2), curved=(0.4, 0.1)) -> Results:
    """Of a round: the flow before at `before` by its full solver, this one at `after`, and 10/N more at N steps."""
    flow = f"reflow-{number}"
    few = [
        measured_row(
            flow, "student", "euler", n, n, None if after is None else after + 10 / n, rms=1 / n, transport=1.5
        )
        for n in steps
    ]
    rows = [
        measured_row(
            "teacher", "teacher", "heun", 8, 15, before, fine=True, rms=0.0, transport=1.75, straightness=curved[0]
        ),
        *few,
        measured_row(flow, "student", "heun", 8, 15, after, fine=True, rms=0.25, transport=1.5, straightness=curved[1]),
    ]
    return Results(
        stage=f"evaluate-{number}", samples=100, seed=1, block=50, device="cpu", guidance_scale=1.0, features=None,
        distance=None if before is None else "SW2", reference=0, vector=False, rows=rows,
    )  # fmt: skip


def found(*each: Results) -> dict[str, Results]:
    return {results.stage: results for results in each}


def text(rounds) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(rounds_table.table(rounds))
    return shown.get()


def test_rounds_are_those_evaluations_that_measured_a_flow_by_the_full_solver():
    one = evaluation(1, 5.0, 4.0)
    without = one.model_copy(
        update={"stage": "evaluate", "rows": [row for row in one.rows if row.network == "teacher"]}
    )
    rounds = rounds_table.rounds(found(evaluation(10, 4.0, 3.0), without, evaluation(2, 4.0, 3.0), one))
    assert [each.stage for each in rounds] == ["evaluate-1", "evaluate-2", "evaluate-10"]
    assert rounds_table.round_of(without) is None
    assert sorted(rounds[0].few) == [1, 2]


def test_a_round_is_told_by_its_usual_steps():
    usual = evaluation(1, 5.0, 4.0)
    along = measured_row("reflow-1", "student", "euler", 2, 2, 3.0, along="optimal")
    (only,) = rounds_table.rounds(found(usual.model_copy(update={"rows": [*usual.rows, along]})))
    assert only.few == {n: usual.row("reflow-1", n) for n in (1, 2)}


def test_the_table_says_each_number_of_a_round():
    rounds = rounds_table.rounds(found(evaluation(1, 5.0, 4.0), evaluation(2, 4.5, 4.25, steps=(1, 4))))
    assert rounds_table.columns(rounds) == [
        "straightness", "SW2, fine solver", "1 step", "2 steps", "4 steps", "RMS to previous flow, fine solver",
        "RMS, 1 step", "transport",
    ]  # fmt: skip
    assert rounds_table.cells(rounds, rounds[0]) == [
        "0.4000 -> 0.1000", "5.00 -> 4.00", "14.00", "9.00", "-", "0.2500", "1.00", "1.7500 -> 1.5000",
    ]  # fmt: skip
    assert rounds_table.cells(rounds, rounds[1])[2:5] == ["14.25", "-", "6.75"]
    shown = text(rounds)
    assert re.search(r"reflow-1 .* 5\.00 -> 4\.00 ", shown)
    assert "A -> B: before and after the round, with the same noise" in shown


def test_without_a_reference_there_is_no_distance():
    (only,) = rounds_table.rounds(found(evaluation(1, None, None)))
    assert rounds_table.columns([only])[:2] == ["straightness", "RMS to previous flow, fine solver"]
    assert rounds_table.cells([only], only) == ["0.4000 -> 0.1000", "0.2500", "1.00", "1.7500 -> 1.5000"]
    assert only.warning is None
    assert list(rounds_table.curves([only])) == ["straightness", "transport"]


@pytest.mark.parametrize(("before", "after", "worse"), [(5.0, 5.25, True), (5.0, 5.0, False), (5.0, 4.0, False)])
def test_a_worse_full_solver_is_a_warning(before, after, worse):
    (only,) = rounds_table.rounds(found(evaluation(3, before, after)))
    assert (only.warning is not None) == worse
    if worse:
        assert only.warning == (
            "with the fine solver, reflow-3 is further from the data than the previous flow: SW2 5.00 -> 5.25. Errors "
            "add up over rounds: use fewer (--rounds), more pairs or solver steps (count and steps of the pairs), or "
            "real data (--forward, --data-weight)"
        )


def test_the_curves_begin_at_the_first_teacher():
    rounds = rounds_table.rounds(found(evaluation(1, 5.0, 4.0), evaluation(2, 4.5, 4.25)))
    assert rounds_table.curves(rounds) == {
        "SW2": {
            "fine solver": [(0, 5.0), (1, 4.0), (2, 4.25)],
            "1 step": [(1, 14.0), (2, 14.25)],
            "2 steps": [(1, 9.0), (2, 9.25)],
        },
        "straightness": {"straightness": [(0, 0.4), (1, 0.1), (2, 0.1)]},
        "transport": {"transport": [(0, 1.75), (1, 1.5), (2, 1.5)]},
    }


def test_the_report_has_a_section_for_rounds(tmp_path):
    import torch

    run = RunPaths(tmp_path / "run")
    run.root.mkdir()
    for results in (evaluation(1, 5.0, 4.0), evaluation(2, 4.0, 4.5)):
        folder = run.stage(results.stage).root
        (folder / "pictures").mkdir(parents=True)
        for row in results.rows:
            (folder / row.picture).write_bytes(images_png(torch.zeros(4, 1, 8, 8), 2))
        write_json(folder / FILE_NAME, results.model_dump(mode="json"))
    for _ in range(2):  # a stage that was killed after its warning says it again
        append_event(run, "warning", label="evaluate-2", text="worse")
    report_page.write(run)
    page = Page(run.report.read_text())
    assert page.open == []
    assert page.text.count("generates 15 times as many samples") == 2, "no evaluation but those of rounds: each is said"
    assert "Rounds flow straightness SW2, fine solver 1 step 2 steps" in page.text
    assert "reflow-2 0.4000 → 0.1000 4.00 → 4.50 14.50 9.50 0.2500 1.00 1.7500 → 1.5000" in page.text
    assert page.text.count("further from the data than the previous flow: SW2 4.00 -> 4.50") == 1
    assert page.text.count("evaluate-2: worse") == 1
    assert [a["alt"] for tag, a in page.tags if tag == "img"][0].startswith("Distance, straightness and transport")
    assert "reflow-1, heun" in page.text, "a flow with the fine solver is called so"


@pytest.mark.long
def test_the_chart_of_rounds_is_the_same_each_time():
    curves = {"SW2": [charts.Curve("1 step", [1, 2], [2.0, 1.0])], "transport": [charts.Curve("t", [0, 1], [1.0, 1.0])]}
    first = charts.panels(curves, "round")
    assert first == charts.panels(curves, "round")
    wide = charts.losses([charts.Curve("loss", [0, 1, 2], [1e4, 0.3, 1e-5])], "images")
    assert ">0.01<" in wide and ">100<" in wide
    steep = [charts.Curve("loss", [0, 1, 2], [3.0, 0.3, 0.02])]
    for drawn in (charts.panels({"SW2": steep}, "round"), charts.losses(steep, "images")):
        assert ">0.02<" in drawn and ">2<" in drawn and "mathdefault" not in drawn, (
            "numbers beside the axis are numbers"
        )
    assert first.count(">round<") == 2 and ">SW2<" in first


def test_a_model_card_has_the_numbers_of_the_students_own_sampler():
    assert {name for name in card_metrics(evaluation(1, 5.0, 4.0), "reflow-1") if name.startswith("SW2")} == {
        "SW2@1", "SW2@2",
    }  # fmt: skip
