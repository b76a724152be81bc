"""The report is one file that agrees with the files of the run, at any moment of the run."""

import base64
import html
import re
from html.parser import HTMLParser

import pytest

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.evaluation import report_page
from distill.evaluation.pictures import images_png
from distill.runs import results
from distill.runs.results import FILE_NAME, FeatureNet, Results, Row, cells, verdicts
from distill.runs.run_store import RunPaths, append_event

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a page refers to, its text, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references, self.texts, self.open, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def measured_row(network: str, role: str, solver: str, steps: int, nfe: int, distance: float | None, **changes) -> Row:
    values = {"kid": 0.001, "precision": 0.8, "recall": 0.7} if distance is not None else {}
    content = {
        "network": network, "role": role, "solver": solver, "steps": steps, "nfe": nfe, "distance": distance,
        "kid": None, "precision": None, "recall": None, "rms": 0.1 * steps, "images_per_second": 1000 / nfe,
        "straightness": 0.5 if role == "teacher" else 0.1, "picture": f"pictures/{network}-{solver}-{steps}.png",
    }  # fmt: skip
    return Row.model_validate({**content, **values, **changes})


def make_results(*, with_distance: bool = True) -> Results:
    d = (lambda value: value) if with_distance else (lambda value: None)
    return Results(
        stage="evaluate", samples=2500, seed=1, block=250, device="cpu", guidance_scale=1.0,
        distance="FD-digits" if with_distance else None, reference=1797, vector=False,
        features=FeatureNet(task="classes", accuracy=0.983, dim=64) if with_distance else None,
        rows=[
            measured_row("teacher", "teacher", "euler", 1, 1, d(1481.0)),
            measured_row("teacher", "teacher", "euler", 4, 4, d(54.0)),
            measured_row("teacher", "teacher", "euler", 16, 16, d(8.0)),
            measured_row("teacher", "teacher", "heun", 16, 31, d(5.3), fine=True, rms=0.0),
            measured_row("one_step", "student", "euler", 1, 1, d(8.6)),
            measured_row("reflow", "student", "euler", 1, 1, d(11.7)),
        ],
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunPaths:
    paths = RunPaths(tmp_path / "a <b> & c")
    paths.root.mkdir()
    paths.spec.write_text("name: r\n# <script>alert(1)</script>\n")
    write_json(
        paths.env,
        {
            "distill": "0.1.0", "git": {"commit": "0123456789abcdef", "changed": True}, "python": "3.11.7",
            "platform": "Linux", "cpus": 2, "threads": 2, "packages": {"torch": "2.14.1", "POT": "0.9.7"},
        },
    )  # fmt: skip
    append_event(paths, "created", digest="0", stages={"teach": "train", "one_step": "train", "evaluate": "evaluate"})
    for done, loss in ((128, 2.0), (256, 1.5), (384, 99.0), (256, 1.5), (384, 1.2), (512, 1.0)):
        logs = {"grad_norm": 1.0, "loss": loss}
        append_event(paths, "progress", label="teach", unit="images", done=done, total=1024, per_second=1.0, logs=logs)
    append_event(paths, "warning", label="teach", text="checkpoint 3 is damaged")
    return paths


def finish(paths: RunPaths, results: Results) -> None:
    import torch

    folder = paths.stage("evaluate").root
    (folder / "pictures").mkdir(parents=True)
    for each in results.rows:
        (folder / each.picture).write_bytes(images_png(torch.zeros(4, 1, 8, 8), 2))
    write_json(folder / FILE_NAME, results.model_dump(mode="json"))
    (paths.root / "students" / "one_step").mkdir(parents=True)


def read(paths: RunPaths) -> Page:
    assert report_page.write(paths) == paths.report
    page = Page(paths.report.read_text())
    assert page.open == []
    return page


def test_page_refers_to_nothing_outside_itself(run):
    finish(run, make_results())
    page = read(run)
    assert len(page.references) == 1 + 6 + 1  # chart, pictures, losses
    for reference in page.references:
        assert re.match(r"data:image/(png|svg\+xml);base64,", reference)
        content = base64.b64decode(reference.partition(",")[2])
        if content.startswith(b"<svg"):
            outside = re.findall(rb'(?:href|src)="(?!#)[^"]*"|url\((?!#)|@import', content)
            assert outside == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    style = run.report.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in re.sub(r"data:[^\"]*", "", run.report.read_text()).replace("http-equiv", "")


def test_page_says_what_the_files_say(run):
    finish(run, make_results())
    page = read(run)
    text = page.text
    assert (
        "With one network call, one_step reaches FD-digits 8.60; the teacher needs 16 network calls of euler for "
        "8.00, and reaches "
        "5.30 with 31 network calls of heun. one_step generates 31 times as many samples per second." in text
    )
    for said in (
        "a <b> & c", "<script>alert(1)</script>", "0123456789ab (with changes)", "2.14.1", "0.9.7", "students/one_step",
        "teach: checkpoint 3 is damaged", "512 of 1,024 images", "1,481", "Straightness", "2,500 samples per row",
    ):  # fmt: skip
        assert said in text, said
    rows = [attributes.get("class") for tag, attributes in page.tags if tag == "tr" and attributes.get("class")]
    assert rows == ["teacher"] * 4 + ["student"] * 2
    pixelated = [a for tag, a in page.tags if tag == "img" and a.get("class") == "pixelated"]
    assert [image["alt"] for image in pixelated][4] == "Samples of one_step, 1 call, FD-digits 8.60"


def test_a_flow_map_has_no_straightness(run):
    full = make_results()
    finish(
        run,
        full.model_copy(
            update={"rows": [*full.rows[:-1], measured_row("map", "student", "jump", 1, 1, 9.0, straightness=None)]}
        ),
    )
    page = read(run)
    assert re.search(r"Straightness teacher 0.5000 one_step 0.1000 map \u2013 Mean square", page.text)
    assert "\u2013 means not defined: for a flow map, which has no paths;" in page.text
    widths = [attributes["style"] for tag, attributes in page.tags if tag == "i"]
    assert widths == ["width: 100.0%", "width: 20.0%", "width: 0.0%"]
    only = full.model_copy(update={"rows": [r.model_copy(update={"straightness": None}) for r in full.rows]})
    assert {value for _, value, _ in report_page._evaluation(only, [], "").straightness} == {"\u2013"}


def test_headlines():
    full = make_results()
    worse = full.model_copy(update={"rows": [r for r in full.rows if r.steps != 16 or r.fine]})
    assert "; the teacher reaches 54.00 with 4 network calls of euler, and 5.30 with 31" in report_page.headline(worse)
    teacher_only = full.model_copy(update={"rows": full.rows[:4]})
    assert report_page.headline(teacher_only) == "The teacher reaches FD-digits 5.30 with 31 network calls."
    blind = make_results(with_distance=False)
    assert report_page.headline(blind).startswith(
        "With one network call, one_step reaches RMS to the teacher 0.1000. one_step does not beat the best baseline "
        "with so few calls. one_step generates"
    )
    ab2 = [measured_row("teacher", "teacher", solver, 1, 1, d) for solver, d in (("ab3", 8.7), ("unipc2", 8.5))]
    strong = full.model_copy(update={"rows": [*full.rows, *ab2]})
    assert [(row.network, base.solver) for row, base in strong.unbeaten] == [
        ("one_step", "unipc2"),
        ("reflow", "unipc2"),
    ]
    assert full.unbeaten == []
    assert verdicts(strong, "one_step") == (
        " With one network call, one_step reaches 8.60, and the teacher 8.50 with unipc2 and one network call: "
        "one_step does not beat it."
    )
    assert verdicts(strong).count("does not beat") == 2 and verdicts(full) == ""
    assert "; the teacher needs one network call of unipc2 for 8.50, and reaches 5.30" in report_page.headline(strong)
    assert "one_step does not beat the best baseline with so few calls." in report_page.headline(strong)
    assert cells(strong, strong.row("reflow", 1))[6] == "8.50 unipc2" and cells(full, full.rows[-1])[6] == "1,481 euler"


def test_a_resumed_run_shows_each_image_once(run):
    _, trainings, _ = report_page._events(run)
    loss = trainings["teach"].curves["loss"]
    assert (loss.at, loss.values) == ([128, 256, 384, 512], [2.0, 1.5, 1.2, 1.0])


def test_unfinished_runs_show_what_there_is(run, tmp_path):
    page = read(run)
    assert "No evaluation has finished yet." in page.text
    assert "teach train begun" in page.text
    assert "one_step train waiting" in page.text
    assert len(page.references) == 1
    bare = RunPaths(tmp_path / "bare")
    bare.root.mkdir()
    assert "No evaluation has finished yet." in read(bare).text
    write_json(run.stage("teach").root.mkdir(parents=True) or run.stage("teach").done, {})
    assert "teach train done" in read(run).text


def test_a_picture_is_embedded_once_and_all_are_bounded(run, monkeypatch):
    found = make_results()
    finish(run, found)
    folder = run.stage("evaluate").root
    rows = [each.model_copy(update={"picture": found.rows[0].picture}) for each in found.rows[:4]]
    write_json(folder / FILE_NAME, found.model_copy(update={"rows": [*rows, *found.rows[4:]]}).model_dump(mode="json"))
    page = read(run)
    assert len([reference for reference in page.references if "image/png" in reference]) == 3
    assert "More pictures" not in page.text
    size = (folder / found.rows[0].picture).stat().st_size
    monkeypatch.setattr(report_page, "MAX_PICTURES", 2 * size)
    page = read(run)
    assert len([reference for reference in page.references if "image/png" in reference]) == 2
    assert "More pictures: in stages/evaluate/pictures." in page.text


def test_a_file_that_only_begins_like_a_picture_is_refused(run):
    finish(run, make_results())
    path = run.stage("evaluate").root / make_results().rows[0].picture
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 5_000_000)
    with pytest.raises(InputError, match="cannot be used: it is not a PNG picture; delete it, and evaluate again"):
        report_page.write(run)


def test_a_missing_picture_is_left_out(run):
    finish(run, make_results())
    (run.stage("evaluate").root / make_results().rows[2].picture).unlink()
    assert len(read(run).references) == 1 + 5 + 1


def test_without_reference_the_chart_shows_rms(run):
    finish(run, make_results(with_distance=False))
    page = read(run)
    chart = base64.b64decode(page.references[0].partition(",")[2]).decode()
    assert "RMS to the teacher" in html.unescape(chart)
    assert "KID" not in page.text


def test_rows_along_other_times_stand_beside_the_usual_ones(run):
    """In table, chart and pictures; the headline, the metrics of a card and `row` are of the usual ones."""
    usual = make_results()
    better = [
        usual.row("teacher", 4).model_copy(update={"along": "optimal", "distance": 1.0}),
        usual.row("reflow", 1).model_copy(update={"along": "1, 0.6, 0", "steps": 2, "nfe": 2, "distance": 0.5}),
    ]
    found = usual.model_copy(update={"rows": [*usual.rows, *better]})
    assert [row.label for row in found.rows[-2:]] == ["teacher, euler, optimal times", "reflow, along 1, 0.6, 0"]
    assert report_page.headline(found) == report_page.headline(usual)
    assert results.card_metrics(found, "reflow") == results.card_metrics(usual, "reflow")
    assert found.row("teacher", 4).distance == 54.0
    assert found.row("teacher", 4, along="optimal").distance == 1.0
    finish(run, found)
    page = read(run)
    assert "teacher, euler, optimal times" in page.text and "reflow, along 1, 0.6, 0" in page.text
    chart = html.unescape(base64.b64decode(page.references[0].partition(",")[2]).decode())
    assert "teacher, optimal times" in chart and "reflow, along 1, 0.6, 0" in chart


def test_same_files_same_page(run):
    finish(run, make_results())
    read(run)
    first = run.report.read_bytes()
    read(run)
    assert run.report.read_bytes() == first


def test_prompts_are_listed_as_text_and_large_pictures_are_smoothed(run):
    import torch

    results = make_results().model_copy(update={"captions": ["a cat", "<b>two</b> dogs & more"], "latents": True})
    finish(run, results)
    large = run.stage("evaluate").root / results.rows[0].picture
    large.write_bytes(images_png(torch.zeros(4, 3, 800, 800), 2))
    page = read(run)
    assert "Pictures show the samples row by row. a cat <b>two</b> dogs & more" in page.text
    assert "RMS to teacher: of the latents." in page.text
    assert [a.get("class") for tag, a in page.tags if tag == "img" and "Samples" in a["alt"]] == [
        None,
        *["pixelated"] * 5,
    ]


def test_the_teacher_at_several_guidance_scales_is_a_chart(run):
    """One panel for the distance, and one for each metric that all rows have; in the order of the scales."""
    results = make_results()
    fine = results.rows[3].model_copy(update={"metrics": {"rank": 2.0, "KID-net": 0.1, "FD-net": 0.5}})
    swept = [
        measured_row(
            "teacher", "teacher", "heun", 16, 31, distance, guidance_scale=scale,
            metrics={"rank": 10.0 * scale, "KID-net": 0.2, "FD-net": 2.0}, picture=f"pictures/{scale:g}.png",
        )
        for scale, distance in ((5.0, 7.0), (0.5, 9.0))
    ]  # fmt: skip
    assert report_page.swept(results) == {}
    found = results.model_copy(update={"rows": [fine, *swept]})
    panels = {title: (curve.at, curve.values) for title, (curve,) in report_page.swept(found).items()}
    assert panels == {
        "FD-digits": ([0.5, 1.0, 5.0], [9.0, 5.3, 7.0]),
        "rank": ([0.5, 1.0, 5.0], [5.0, 2.0, 50.0]),
        "FD-net": ([0.5, 1.0, 5.0], [2.0, 0.5, 2.0]),
    }
    assert list(panels) == ["FD-digits", "rank", "FD-net"], "scores before features"
    finish(run, found)
    assert "The teacher at several guidance scales" in report_page.write(run).read_text()
