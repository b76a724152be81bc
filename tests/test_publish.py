"""Publishing of students: versions that never change, an index with several writers, complete model cards."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import command, snapshot
from flaky import Fault, Flaky
from runs import distill, folder_bytes, make_run
from students import PICTURE, make, put

from distill.cli import students
from distill.core.errors import InputError, RunError
from distill.exchange import published, publishing, pulling, student_card
from distill.exchange.student_card import TrainingCost
from distill.exchange.transports import at
from distill.runs import cached
from distill.runs.cached import UsedCache
from distill.runs.run_store import CREATED, RunPaths

SPEC = """
name: one
teacher: {kind: mixture, means: [[2, 0], [-2, 0]], std: 0.2}
data: {kind: none}
stages:
  pairs: {kind: pairs, count: 64, block: 32, shard: 32, steps: 2}
  long: &train
    kind: train
    recipe: reflow/reflow
    network: {kind: mlp, width: 16, depth: 2}
    pairs: pairs
    images: 2560
    batch_size: 64
    ema_half_lives: [64]
    checkpoint: {images: 1280, keep: 2}
  short: {kind: train, recipe: reflow/reflow, init: long, pairs: pairs, images: 64, batch_size: 64, optimizer: {lr: 1}}
  evaluate: {kind: evaluate, teacher_steps: [1, 2], students: {long: [1, 2], short: [1, 2]}, samples: 256}
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs"


# --- versions ---


def test_versions_are_numbered_and_never_change(tmp_path, store):
    a, b, c = (make(tmp_path / f"s{seed}", seed=seed) for seed in range(3))
    assert put(a, store, "digits").label == "digits:v1"
    assert put(b, store, "digits").label == "digits:v2"
    assert put(a, store, "digits").label == "digits:v1", "the same bytes"
    assert put(a, store, "digits", "v1").label == "digits:v1"
    before = snapshot(store)
    with pytest.raises(
        InputError, match="digits:v1 is already published with other files, and published versions never change; give"
    ):
        put(b, store, "digits", "v1")
    assert snapshot(store) == before
    assert put(a, store, "digits", "final").label == "digits:final", "asked for by name"
    (store / "registry" / "digits" / "v1").rename(store / "registry" / "digits" / "v9")
    assert put(c, store, "digits").label == "digits:v10"
    labels = [entry.label for entry in published.scan(store).students]
    assert labels[-1] == "digits:v10"
    assert json.loads((store / "registry" / "_index.json").read_text())["students"][-1]["version"] == "v10"


def test_a_published_student_is_its_folder_with_another_card(tmp_path, store):
    student = make(tmp_path / "s", license="cc-by-4.0")
    entry = put(student, store, "digits", picture=PICTURE)
    folder = store / "registry" / "digits" / "v1"
    theirs, ours = folder_bytes(student), folder_bytes(folder)
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"README.md", "samples.png", "distill.json"}
    card = pulling.verify(folder)
    assert (card.name, card.license, entry.license) == ("digits", "cc-by-4.0", "cc-by-4.0")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["v1"], "nothing is left beside"


@pytest.mark.parametrize("name", ["a/b", ".a", "a:b:c", "a:", "", "x" * 65, "a:.b", "../a"])
def test_names_that_cannot_be(capfd, tmp_path, name):
    make(tmp_path / "s")
    before = snapshot(tmp_path)
    done = command(capfd, "publish", "s", name)
    assert done.code == 2
    assert "NAME or NAME:VERSION is expected" in done.err
    assert snapshot(tmp_path) == before


def test_a_student_that_is_damaged_is_not_published(tmp_path, store):
    student = make(tmp_path / "s")
    (student / "model_index.json").write_text("{}")
    with pytest.raises(
        RunError, match="model_index.json: the transfer ended after 2 of 108 bytes; the published copy is incomplete"
    ):
        put(student, store, "digits")
    assert list((store / "registry" / "digits").iterdir()) == []


def test_a_full_disk_publishes_nothing(tmp_path, store, monkeypatch):
    student = make(tmp_path / "s", size=100_000)
    monkeypatch.setattr("distill.core.space.free", lambda folder: 1000)
    with pytest.raises(
        RunError, match=r"not enough disk space for the files of .*: 11\d\.\d kB needed, but only 1.0 kB free"
    ):
        put(student, store, "digits")
    assert list((store / "registry" / "digits").iterdir()) == []


def test_a_run_that_lies_where_students_belong(tmp_path, store):
    (store / "registry").mkdir(parents=True)
    (store / "registry" / "spec.yaml").touch()
    with pytest.raises(InputError, match="registry is a run, but published students are stored in a folder with"):
        put(make(tmp_path / "s"), store, "digits")


def test_a_run_cannot_take_the_place_of_students(capfd, tmp_path, store):
    put(make(tmp_path / "s"), store, "digits")
    done = command(capfd, "run", "digits", "--name", "registry")
    assert done.code == 2
    assert done.err.startswith("error: a run cannot be called 'registry': the store uses that folder for published")


@pytest.mark.process
def test_publishers_and_pullers_at_once_lose_nothing(tmp_path, store):
    """Four processes publish three students each under one name, while two pull the newest again and again."""
    publisher = (
        "import sys; from pathlib import Path; from students import put\n"
        "for path in sys.argv[2:]: put(Path(path), Path(sys.argv[1]), 'digits')"
    )
    puller = (
        "import shutil, sys; from distill.cli.main import main\n"
        "for n in range(6):\n"
        "    assert main(['pull', 'digits', sys.argv[2], '--store', sys.argv[1]]) == 0\n"
        "    shutil.rmtree(sys.argv[2])"
    )
    put(make(tmp_path / "first", seed=100), store, "digits")
    students = [make(tmp_path / f"s{n}", seed=n, size=200_000) for n in range(12)]
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}

    def start(program, *arguments):
        line = [sys.executable, "-c", program, str(store), *map(str, arguments)]
        return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    processes = [start(publisher, *students[n::4]) for n in range(4)]
    processes += [start(puller, tmp_path / f"pulled{n}") for n in range(2)]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, said
    found = published.scan(store).students
    assert sorted(int(entry.version[1:]) for entry in found) == list(range(1, 14))
    assert len({entry.digest for entry in found}) == 13
    index = json.loads((store / "registry" / "_index.json").read_text())["students"]
    assert index == [entry.model_dump(mode="json") for entry in found]
    for entry in found:
        pulling.verify(store / "registry" / "digits" / entry.version)
    assert not list((store / "registry").rglob(".*"))


@pytest.mark.process
def test_a_killed_publisher_leaves_no_version_and_the_next_one_clears_up(tmp_path, store):
    student = make(tmp_path / "s", size=60_000_000)
    program = "import sys; from pathlib import Path; from students import put; put(*map(Path, sys.argv[1:3]), 'digits')"
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}
    process = subprocess.Popen([sys.executable, "-c", program, student, store], env=env, stderr=subprocess.DEVNULL)
    while not list(store.glob("registry/digits/.new.tmp-*/unet/*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert published.scan(store).students == []
    assert len(list((store / "registry" / "digits").iterdir())) == 1
    assert put(make(tmp_path / "t"), store, "digits").label == "digits:v1"
    assert [path.name for path in (store / "registry" / "digits").iterdir()] == ["v1"]


def test_a_store_of_a_group_can_be_written_by_all_of_it(tmp_path, store):
    before = os.umask(0o002)
    try:
        put(make(tmp_path / "s"), store, "digits")
    finally:
        os.umask(before)
    for path in (store, *store.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o775 if path.is_dir() else 0o664), path


@pytest.mark.process
def test_users_of_a_group_publish_in_one_store(tmp_path, store):
    """As root: two users of one group in turn, the second over the index that the first has written."""
    program = (
        "import os, sys; from pathlib import Path; from students import put\n"
        "put(Path(sys.argv[1]), Path(sys.argv[4]), 'digits')\n"  # all that is imported: the other may not read it
        "os.umask(0o002)\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(12345); os.setuid(int(sys.argv[3]))\n"
        "print(put(Path(sys.argv[1]), Path(sys.argv[2]), 'digits').label)"
    )
    store.mkdir()
    if os.geteuid() == 0:
        os.chown(store, 0, 12345)
        for above in tmp_path.parents:
            if above.stat().st_uid == 0 and above != Path("/"):
                above.chmod(above.stat().st_mode | 0o011)
        tmp_path.chmod(0o755)
    store.chmod(0o2775)
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}
    for seed, user in ((1, "20001"), (2, "20002")):
        line = [sys.executable, "-c", program, make(tmp_path / f"s{seed}", seed=seed), store, user, tmp_path / "other"]
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"digits:v{seed}\n"), done.stderr
    assert [entry.version for entry in published.scan(store).students] == ["v1", "v2"]
    if os.geteuid() == 0:
        owners = [(store / "registry" / "digits" / f"v{n}").stat().st_uid for n in (1, 2)]
        assert owners == [20001, 20002]


# --- stores that are URLs ---


def test_a_store_over_plain_http(capfd, tmp_path, store):
    for seed in range(2):
        put(make(tmp_path / f"s{seed}", seed=seed), store, "digits")
    put(make(tmp_path / "s2", seed=2), store, "mnist", "final")
    with Flaky(tmp_path) as server:
        url = f"{server.url}/runs"
        assert command(capfd, "config", "store", url).out == f"store: {url}, in {tmp_path}/config/distill/config.yaml\n"
        listed = json.loads(command(capfd, "students", "--json").out)
        assert [(e["name"], e["version"]) for e in listed] == [("digits", "v1"), ("digits", "v2"), ("mnist", "final")]
        assert "digits:v2" in command(capfd, "students").out
        for given, dest, there in [
            ("digits", "digits", "digits/v2"),
            ("digits:v1", "digits-v1", "digits/v1"),
            ("mnist", "mnist", "mnist/final"),
        ]:
            done = command(capfd, "pull", given)
            assert done.code == 0, done.err
            assert done.out.startswith(f"pulled {dest}: ")
            assert folder_bytes(tmp_path / dest) == folder_bytes(store / "registry" / there)
        done = command(capfd, "pull", "digit")
        assert (
            done.err == f"error: {url} has no published student 'digit'; did you mean 'digits'? valid: digits, mnist\n"
        )
        done = command(capfd, "pull", "digits:v3")
        assert "v3 is not a student folder: it has no distill.json" in done.err
        done = command(capfd, "list")
        said = f"error: the store {url} (from {tmp_path}/config/distill/config.yaml) is a URL, which works only for "
        said += "`distill pull` and `distill students`; for this command, give a local folder with --store\n"
        assert (done.code, done.err) == (2, said)
        server.faults = [
            Fault("v2/distill.json", change=lambda content: (store / "registry/digits/v1/distill.json").read_bytes())
        ]
        done = command(capfd, "pull", "digits:v2", "again")
        assert done.code == 2
        assert (
            "is not the student in the store's index (sha256 " in done.err
            and "published versions never change" in done.err
        )
        server.faults = [Fault("_index.json", status=404)]
        assert (
            "_index.json: 404 Not Found; nothing has been published here, or this is not a store"
            in command(capfd, "students").err
        )
        server.faults = [Fault("_index.json", change=lambda content: b"[]")]
        done = command(capfd, "students")
        assert (done.code, done.err) == (
            2, f"error: {url}/registry/_index.json is not an index of students: [] given; input should be an object\n"
        )  # fmt: skip
        server.faults = [Fault("_index.json", change=lambda content: content.replace(b"digits", b"../x", 1))]
        done = command(capfd, "students", "--json")
        assert [(e["name"], e["version"]) for e in json.loads(done.out)] == [("digits", "v2"), ("mnist", "final")]
        pattern = "name: \"../x\" given; string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'"
        assert done.err == f"warning: entry 1 of {url}/registry/_index.json is skipped: {pattern}\n"


def test_an_index_that_lags_behind_hides_no_version_that_is_named(capfd, tmp_path, store):
    put(make(tmp_path / "s0", seed=0), store, "digits")
    index = (store / "registry" / "_index.json").read_bytes()
    put(make(tmp_path / "s1", seed=1), store, "digits")
    (store / "registry" / "_index.json").write_bytes(index)
    with Flaky(tmp_path) as server:
        assert command(capfd, "pull", "digits:v2", "--store", f"{server.url}/runs").code == 0
    assert command(capfd, "pull", "digits", "newest").code == 0, "folders that can be listed need no index"
    assert folder_bytes(tmp_path / "newest") == folder_bytes(store / "registry" / "digits" / "v2")


# --- settings ---


def test_settings_say_where_they_come_from(capfd, tmp_path, monkeypatch):
    def shown():
        return command(capfd, "config").out.split()[-3:]

    path = tmp_path / "config" / "distill" / "config.yaml"
    assert " ".join(shown()) == "runs the default"
    path.parent.mkdir(parents=True)
    path.write_text("# mine\nstore: /old\n# the end\n")
    assert shown()[1:] == ["/old", str(path)]
    assert command(capfd, "config", "store", "here").code == 0
    assert path.read_text() == f"# mine\n# the end\nstore: {tmp_path}/here\n"
    monkeypatch.setenv("DISTILL_STORE", "there")
    assert shown()[1:] == ["there", "$DISTILL_STORE"]
    monkeypatch.setenv("DISTILL_STORE", far := "/far" * 100)
    assert shown()[1:] == [far, "$DISTILL_STORE"], "a path is whole, and on one line"
    before = path.read_bytes()
    for value, said in [
        ("ftpx://host/x", "unknown scheme 'ftpx'"),
        (__file__, "is a file; name a folder or a URL"),
        ("https://host/x?y", "without '?', '#' and '::'"),
    ]:
        done = command(capfd, "config", "store", value)
        assert done.code == 2 and said in done.err
    assert (
        "there is no setting 'stor'; did you mean 'store'? valid: site, store"
        in command(capfd, "config", "stor", "x").err
    )
    assert path.read_bytes() == before
    done = command(capfd, "list", "--store", "https://host/x")
    assert "(from --store) is a URL" in done.err


# --- students of runs ---


def test_the_time_of_a_stage_is_that_of_its_processes(store):
    """Not what lay between a kill and the next start, nor the other stages; of a checkpoint up to its save."""
    run = make_run(store)
    events = [
        (0, "started", {}), (10, "stage started", {"stage": "teach", "device": "H100"}),
        (20, "saved", {"stage": "teach", "step": 100}), (25, "progress", {"label": "teach", "done": 1}),
        (1000, "started", {}), (1010, "stage started", {"stage": "teach", "device": "H100"}),
        (1015, "stopped", {}), (2000, "stage started", {"stage": "teach", "device": "H200"}),
        (2007, "saved", {"stage": "teach", "step": 200}), (2008, "stage done", {"stage": "teach"}),
        (2009, "stage started", {"stage": "pairs", "device": "H200"}), (2050, "stage done", {"stage": "pairs"}),
    ]  # fmt: skip
    (run.root / CREATED).write_text(
        "".join(json.dumps({"time": at, "event": what, **more}) + "\n" for at, what, more in events)
    )
    chosen = publishing.ChosenStudent(run, "reflow", None)
    costs = {cost.stage: cost for cost in publishing.describe("x", chosen, 640, "").costs}
    assert list(costs) == ["teach", "pairs", "reflow"]
    assert (costs["teach"].time, costs["teach"].place) == ("0:23", "1 process, H200")
    assert (costs["pairs"].time, costs["reflow"].work) == ("0:41", "640 images")
    early = publishing.describe("x", publishing.ChosenStudent(run, "teach", 100), 100, "").costs
    assert [(cost.stage, cost.work, cost.time) for cost in early] == [("teach", "100 images", "0:10")]


def test_the_cache_stage_is_a_cost_of_each_student(store):
    run = make_run(store, "one", "sd15-perflow", "launch.nodes=1", "launch.procs=2")
    caches = [
        UsedCache("latents", f"caches/latents-{'0' * 64}", 2500, 3),
        UsedCache("prompts", f"caches/prompts-{'0' * 64}", 40, 1),
    ]
    run.stage("cache").root.mkdir(parents=True)
    cached.note(run, "cache", caches)
    with (run.root / CREATED).open("a") as file:
        for at, what in ((10, "stage started"), (75, "stage done")):
            file.write(json.dumps({"time": at, "event": what, "stage": "cache", "device": "H200"}) + "\n")
    chosen = publishing.choose(run, None, "")
    costs = publishing.describe("x", chosen, 640, "").costs
    assert costs[0] == TrainingCost("cache", "2,500 images, 40 prompts", "1:05", "2 processes, H200")
    assert costs[-1].stage == chosen.stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a small run of two students, and their evaluation."""
    folder = tmp_path_factory.mktemp("publish")
    (folder / "spec.yaml").write_text(SPEC.replace("&train", ""))
    done = distill("run", "spec.yaml", cwd=folder, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished, monkeypatch):
    monkeypatch.chdir(finished)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield RunPaths(finished / "runs" / "one")
    torch.set_num_threads(before)


@pytest.mark.process
def test_the_students_of_a_run(capfd, run):
    assert (publishing.choose(run, None, "").stage, publishing.choose(run, "long", "").stage) == ("short", "long")
    assert publishing.choose(run, None, "best").stage == "long", "a rate of 1 cannot be good"
    for given, said in [
        ("one@bset", "'@bset': did you mean 'best'? valid: best, step-N (N: the step of a checkpoint)"),
        ("one/long@best", "'one/long@best': best is for a whole run; write one@best"),
        ("one/none", "run 'one' has no train stage 'none'; valid: long, short"),
        ("two", "there is no run or student 'two'; give RUN or RUN/STAGE of runs, or a student's folder"),
        ("one/long@step-7", f"there is no checkpoint of step 7 in {run.stage('long').checkpoints}; available: "
         "step-40, step-20"),
    ]:  # fmt: skip
        done = command(capfd, "publish", given, "x")
        assert (done.code, done.err) == (2, f"error: {said}\n")
    assert not (run.root.parent / "registry").exists()


@pytest.mark.process
def test_a_whole_model_card(capfd, run):
    done = command(capfd, "publish", "one@best", "ring")
    assert done.code == 0, done.err
    assert done.out == "published ring:v1: runs/registry/ring/v1\nget it with: distill pull ring:v1\n"
    folder = run.root.parent / "registry" / "ring" / "v1"
    card, text = pulling.verify(folder), (folder / "README.md").read_text()
    assert card.metrics == student_card.read(run.student("long")).metrics
    (picture,) = run.stage("evaluate").root.glob("pictures/*long*1.png")
    assert (folder / "samples.png").read_bytes() == picture.read_bytes()
    for line in [
        "# ring", "](samples.png)", 'DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)',
        "distill pull ring",
        "| recipe | `reflow/reflow`: Reflow (Liu et al. 2022", "| teacher | mixture in closed form",
        "NFE: calls of a network per sample. 256 samples per row. SW2: sliced Wasserstein-2",
        "|  | steps | NFE | SW2 | KID x 1000 |", "| **this student** | 1 | 1 |", "| **this student** | 2 | 2 |",
        "| teacher, euler | 2 | 2 |", "## Training cost", "| long | 2,560 images | 0:0", "1 process, ",
        "| pairs | 64 pairs | 0:0", "## Limits", "It does not support classifier-free guidance", "Terms of use: "
        "not stated",
    ]:  # fmt: skip
        assert line in text, line
    assert "short" not in text, "a stage that it does not come from"
    again = command(capfd, "publish", "one/long", "ring")
    assert again.out.startswith("this student is already published: ring:v1\n")


@pytest.mark.process
def test_a_checkpoint_is_exported_and_published(capfd, run, monkeypatch):
    """It is exported in the store, where a large student has room, and nothing stays behind."""
    places, student = [], students._student
    monkeypatch.setattr(students, "_student", lambda chosen, place: places.append(place) or student(chosen, place))
    done = command(capfd, "publish", "one/long@step-20", "early:half")
    assert done.code == 0, done.err
    folder = run.root.parent / "registry" / "early" / "half"
    card, text = pulling.verify(folder), (folder / "README.md").read_text()
    assert (card.images, card.metrics) == (1280, {})
    assert "| long | 1,280 images | 0:0" in text
    assert "Its samples were not evaluated" in text
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert [each.parent.parent for each in places] == [run.root.parent]
    assert not [*run.root.parent.glob(".publishing*")]
    same = command(capfd, "publish", "one/long@step-40", "late")
    assert same.code == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    late = folder.parent.parent / "late" / "v1"
    assert (late / weights).read_bytes() == (run.student("long") / weights).read_bytes()
    assert (late / weights).read_bytes() != (folder / weights).read_bytes()


@pytest.mark.process
def test_pull_takes_students_of_runs_too(capfd, run, tmp_path):
    for given, stage in [
        ("one", "short"),
        ("one/long", "long"),
        ("one@best", "long"),
        ("runs/one/students/long", "long"),
    ]:
        done = command(capfd, "pull", given, str(tmp_path / re.sub(r"\W", "-", given)))
        assert done.code == 0, done.err
        assert folder_bytes(tmp_path / re.sub(r"\W", "-", given)) == folder_bytes(run.student(stage))
    done = command(capfd, "pull", "one@step-20", str(tmp_path / "x"))
    assert "' is a checkpoint, not a student; first export it with distill export or distill publish" in done.err
    with Flaky(run.root.parent) as server:
        assert command(capfd, "pull", "one/long", str(tmp_path / "far"), "--store", server.url).code == 0
    assert folder_bytes(tmp_path / "far") == folder_bytes(run.student("long"))


@pytest.mark.process
def test_what_is_pulled_is_a_pipeline_of_plain_diffusers(capfd, run, tmp_path):
    from diffusers import DiffusionPipeline

    assert command(capfd, "publish", "one", "plain").code == 0
    assert command(capfd, "pull", "plain", str(tmp_path / "plain")).code == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert pipeline(num_inference_steps=1, batch_size=3).images.shape == (3, 2)
    assert command(capfd, "verify", str(tmp_path / "plain")).code == 0, "using it has changed nothing"


def test_at_takes_a_folder_or_a_url(tmp_path):
    assert at(tmp_path).where == str(tmp_path)
    assert at("https://me:secret@host/a/").below("b").where == "https://host/a/b"
    assert at("http://[::1]:8000/a").where == "http://[::1]:8000/a"
