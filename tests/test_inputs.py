"""Inputs of a run: fetched over real HTTP before its job is submitted, and read by the job without a network.

Each test uses its own process, since the libraries read the environment when they are imported.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from datasets import load_from_disk
from hub import CLASSES, GATED, MUTE, NO_GC, Commit, Hub, environment, pictures, pipeline, python
from PIL import Image
from runs import folder_bytes, make_run

from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.hub_repository import Repository
from distill.core.records import read_json
from distill.execution import prefetch
from distill.execution.prefetch import Input
from distill.runs.run_store import RunPaths
from distill.spec.model import RunSpec
from distill.teachers import by_id

DAY = 86400
PAIRS = {"kind": "pairs", "count": 8, "block": 4, "shard": 4, "steps": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"kind": "diffusers", "path": "org/tiny"}
PICTURES = {"kind": "hf", "path": "org/pictures", "size": 8, "channels": 1, "label_column": "label"}

# Specs from a file, each made a run whose inputs are fetched; what was refused is printed.
MAKE = """
import json, os, sys
from pathlib import Path
from distill.execution import prefetch
from distill.spec import specfile
from distill.runs import todo
from distill.core.errors import InputError, RunError
from distill.spec.model import RunSpec
from distill.runs.run_store import create_run

for given in json.loads(sys.argv[2]):
    spec, store = RunSpec.model_validate(given), Path(sys.argv[1])
    print("run", spec.name, file=sys.stderr)
    try:
        found = prefetch.resolve(spec, store)
    except (InputError, RunError) as error:
        print(type(error).__name__, error)
    else:
        prefetch.link(create_run(store, spec.name, {"spec.yaml": specfile.resolved(spec), **prefetch.record(found)}))
"""

# What runs read, by their specs; their folders are the last argument.
READ = """
import hashlib, json, sys, torch
from pathlib import Path
from distill import data, teachers
from distill.spec import specfile
from distill.runs import todo
from distill.runs.run_store import RunPaths

for folder in json.loads(sys.argv[-1]):
    spec = todo.load_spec(RunPaths(Path(folder)))
    said = {}
    if spec.teacher is not None:
        teacher = teachers.load_teacher(spec.teacher, torch.device("cpu"))
        x = torch.full((1, *teacher.shape), 0.5)
        velocity = teacher.field(x, torch.tensor([0.5]), {})
        said["teacher"] = [teacher.digest, teacher.description, velocity.flatten().tolist()]
    if spec.data.kind != "none":
        found = data.load_data(spec.data, seed=0)
        images, labels, _ = found.items(0, range(len(found)))
        images = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        said["data"] = [found.name, found.digest, images, labels.tolist(), found.num_classes]
    print(json.dumps(said))
"""


def spec(name: str, **fields) -> dict[str, object]:
    return {"name": name, "stages": {"pairs": PAIRS}, **fields}


def made(store: Path, *specs: dict[str, object], hub: Hub) -> tuple[list[str], str]:
    """Runs of these specs in a store: what was refused, and what was told on the way."""
    done = python(MAKE, str(store), json.dumps(specs), hub=hub, cwd=store.parent / "work")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def job(run: Path, hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a job of a run, on a machine whose own caches are empty."""
    return environment(hub, home) | prefetch.environment({each.what for each in prefetch.read(RunPaths(run))}, run)


def read_by_job(run: Path, hub: Hub) -> dict[str, list]:
    done = subprocess.run(
        [sys.executable, "-c", NO_GC + READ, json.dumps([str(run)])],
        cwd=run.parent, env=job(run, hub, run.parent.parent / "empty"),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def folders(store: Path) -> list[str]:
    """What lies among the inputs of a store."""
    return sorted(path.name for path in (store / "inputs").glob("*")) if store.exists() else []


# --- fetched, and read without a network ---


@dataclass(frozen=True)
class Fetched:
    """Runs made while the hub was there; what the hub gave for their specs; and the store, elsewhere since."""

    store: Path
    hub: Hub
    online: dict[str, dict[str, list]]
    told: str
    requests: list[str]  # of later fetches, of a name and of its commit


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Fetched:
    root = tmp_path_factory.mktemp("fetched")
    tiny = {name: pipeline(root / name / "tiny", seed) for seed, name in enumerate(("main", "v2", "next"))}
    sets = {name: pictures(root / name / "set", labels) for name, labels in (("main", [0, 2, 1]), ("next", [3, 3]))}
    for name in CLASSES[:2]:
        (root / "files" / "train" / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 50).convert("RGB").save(root / "files" / "train" / name / "1.png")
    served = {
        "models/org/tiny": {"main": tiny["main"], "v2": tiny["v2"]},
        "datasets/org/pictures": {"main": sets["main"], "old": sets["main"]},
        "datasets/org/files": {"main": root / "files"},
    }
    store = root / "store"
    with Hub(served) as hub:
        specs = [
            spec("both", teacher=TINY, data=PICTURES),
            spec("named", teacher=TINY | {"revision": "v2"}, data=PICTURES | {"revision": "old"}),
            spec("files", data=PICTURES | {"path": "org/files"}),
        ]
        runs = [str(store / each["name"]) for each in specs]
        done = python(MAKE + READ, str(store), json.dumps(specs), json.dumps(runs), hub=hub, cwd=store.parent / "work")
        assert done.returncode == 0, done.stderr
        said = [json.loads(line) for line in done.stdout.splitlines()]  # refused: none
        online = {each["name"]: answer for each, answer in zip(specs, said, strict=True)}
        sha, before = hub.commits["models/org/tiny"]["main"].sha, len(hub.requests)
        shutil.rmtree(root / "home")  # the caches of whoever fetches next are empty
        hub.commits["models/org/tiny"]["main"] = Commit(tiny["next"])
        hub.commits["datasets/org/pictures"]["main"] = Commit(sets["next"])
        later = [
            spec("again", teacher=TINY | {"revision": "v2"}),
            spec("by-sha", teacher=TINY | {"revision": sha}),
            spec("later", teacher=TINY, data=PICTURES),
        ]
        assert made(store, *later, hub=hub)[0] == []
        requests = [request for request in hub.requests[before:] if "/org/" in request]
    shutil.rmtree(root / "home")
    elsewhere = root / "elsewhere" / "runs"
    elsewhere.parent.mkdir()
    store.rename(elsewhere)
    return Fetched(elsewhere, hub, online, done.stderr, requests)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("name", ["both", "named", "files"])
def test_a_job_reads_what_the_hub_had_when_it_was_submitted(fetched, name):
    """The hub is gone, its branches had moved before, the store lies elsewhere, and the user's caches are empty."""
    assert read_by_job(fetched.store / name, fetched.hub) == fetched.online[name]


@pytest.mark.long
@pytest.mark.process
def test_a_branch_that_moves_is_another_commit_for_later_runs_alone(fetched):
    before, after = (prefetch.read(RunPaths(fetched.store / name)) for name in ("both", "later"))
    for old, new, kind in zip(before, after, ("models/org/tiny", "datasets/org/pictures"), strict=True):
        assert old.id == new.id and old.commit != new.commit
        assert new.commit == fetched.hub.commits[kind]["main"].sha
    teacher, data = (each.content(fetched.store) for each in after)
    weights = folder_bytes(teacher)[f"unet/{WEIGHTS}"]
    assert weights == fetched.hub.commits["models/org/tiny"]["main"].files[f"unet/{WEIGHTS}"]
    assert load_from_disk(str(data))["label"] == [3, 3]
    assert fetched.online["both"]["data"][3] == [0, 2, 1]


@pytest.mark.process
@pytest.mark.long
def test_a_stage_makes_the_same_pairs_without_a_network(fetched, tmp_path):
    def solve(run: Path, env: dict[str, str]) -> dict[str, bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "distill", "stage", str(run), "pairs"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return folder_bytes(RunPaths(run).stage("pairs").pairs)

    run = fetched.store / "by-sha"
    local = tmp_path / "local"
    shutil.copytree(run, local, symlinks=True, ignore=shutil.ignore_patterns("inputs"))
    pairs = solve(run, job(run, fetched.hub, tmp_path / "empty"))
    with Hub({"models/org/tiny": {"main": fetched.store.parent.parent / "main" / "tiny"}}) as hub:
        assert solve(local, environment(hub, tmp_path / "home")) == pairs
    assert len(pairs) == 3


@pytest.mark.long
@pytest.mark.process
def test_what_was_fetched_is_not_fetched_again(fetched):
    """For a name, the hub is asked for its commit; for a commit, it is not asked at all; what is new is fetched."""
    asked, new, *rest = fetched.requests
    assert asked == "GET /api/models/org/tiny/revision/v2"
    assert new == "GET /api/models/org/tiny"
    commit = fetched.hub.commits["models/org/tiny"]["main"].sha
    fetched_files = [request for request in rest if "/org/tiny/resolve/" in request]
    assert any(request.endswith(f"/{commit}/unet/{WEIGHTS}") for request in fetched_files)
    assert all(f"/org/tiny/resolve/{commit}/" in request for request in fetched_files), "no file of another commit"


@pytest.mark.long
@pytest.mark.process
def test_the_store_holds_what_is_read_and_nothing_else(fetched):
    teacher, data = prefetch.read(RunPaths(fetched.store / "both"))
    assert (teacher.what, teacher.id, teacher.revision) == ("teacher", "org/tiny", None)
    assert (data.what, data.id, data.revision) == ("data", "org/pictures", None)
    files = folder_bytes(teacher.content(fetched.store))
    assert {Path(name).suffix for name in files} == {".json", ".md", ".safetensors"}  # README.md: for its licence
    assert teacher.bytes == sum(len(content) for content in files.values())
    named = {each.digest for run in fetched.store.glob("*/inputs") for each in prefetch.read(RunPaths(run.parent))}
    assert folders(fetched.store) == sorted(named)
    assert len(named) == 6, "two commits of main and v2; two of pictures, one by two names; files"
    (line,) = [line for line in fetched.told.splitlines() if line.startswith("teacher org/tiny@" + teacher.commit[:12])]
    assert line.endswith(f"kB in {fetched.store.parent.parent / 'store' / 'inputs' / teacher.digest}")


# --- refused ---


@pytest.mark.long
@pytest.mark.process
def test_what_cannot_be_had_is_one_message_and_leaves_nothing(tmp_path):
    tiny, some = pipeline(tmp_path / "tiny", 0), pictures(tmp_path / "some", [0, 1])
    served = {
        "models/org/tiny": {"main": tiny},
        "models/org/huge": {"main": tiny},
        "datasets/org/huge": {"main": some},
        f"models/{GATED}": {"main": tiny},
        f"datasets/{GATED}": {"main": some},
    }
    neither = "is neither a folder here nor a hub id that can be fetched or is cached"
    gated = "request access on the repository's page, then log in with `hf auth login`"
    hint = "; check the name and the internet connection, or download it and give the folder"
    with Hub(served) as hub:
        hub.commits["models/org/huge"]["main"].said = {f"unet/{WEIGHTS}": 10**15}
        hub.commits["datasets/org/huge"]["main"].said = {"data/train-00000-of-00001.parquet": 10**15}
        gated_sha = hub.commits[f"models/{GATED}"]["main"].sha
        expected = [
            (TINY | {"revision": "v3"}, f"org/tiny at revision v3 {neither} (there is no such revision){hint}"),
            (TINY | {"path": "org/no"}, f"org/no {neither} (there is no such repository, or it is private){hint}"),
            (TINY | {"path": MUTE}, f"{MUTE} {neither} (Server disconnected without sending a response.){hint}"),
            (TINY | {"path": GATED}, f"{GATED} at revision {gated_sha} {neither} ({gated}){hint}"),
            (TINY | {"path": "org/huge"}, "org/huge needs 2000.0 TB in "),
        ]
        wrong = [
            (PICTURES | {"path": "org/no"}, "org/no (split 'train') cannot be read: there is no such repository, or"),
            (PICTURES | {"path": MUTE}, f"{MUTE} (split 'train') cannot be read: Server disconnected without sending"),
            (PICTURES | {"path": GATED}, f"{GATED} at revision "),
            (PICTURES | {"path": "org/huge"}, "org/huge needs 3000.0 TB in "),
        ]
        specs = [spec("t", teacher=each) for each, _ in expected] + [spec("d", data=each) for each, _ in wrong]
        refused, _ = made(tmp_path / "store", *specs, hub=hub)
    said = [f"InputError teacher.path={text}" for _, text in expected]
    said += [f"InputError data.path={text}" for _, text in wrong]
    assert len(refused) == len(said), refused
    for line, start in zip(refused, said, strict=True):
        assert line.startswith(start)
    assert "TB are free" in refused[4] or "GB are free" in refused[4]
    assert refused[4].endswith("; free some space, or set other folders with --store and HF_HOME")
    assert f"Dataset '{GATED}' is a gated dataset on the Hub" in refused[7]
    assert not (tmp_path / "store").exists()


# --- killed, and two at once ---


@dataclass(frozen=True)
class Site:
    """A hub with a teacher of 100 MB, and a store."""

    hub: Hub
    store: Path

    def start(self, name: str) -> subprocess.Popen:
        work = self.store.parent / "work"
        work.mkdir(exist_ok=True)
        arguments = [str(self.store), json.dumps([spec(name, teacher=TINY)])]
        return subprocess.Popen(
            [sys.executable, "-c", NO_GC + MAKE, *arguments],
            cwd=work, env=environment(self.hub, self.store.parent / "home"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def killed_when(self, condition) -> None:
        """A process that makes a run, killed as soon as the condition holds."""
        with self.start("killed") as process:
            while not condition():
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL


@pytest.fixture
def site(tmp_path) -> Site:
    folder = pipeline(tmp_path / "tiny", 0)
    (folder / "unet" / WEIGHTS).write_bytes(os.urandom(10**8))  # nobody reads them here
    with Hub({"models/org/tiny": {"main": folder}}) as hub:
        yield Site(hub, tmp_path / "store")


@pytest.mark.process
@pytest.mark.long
def test_a_kill_while_it_downloads_leaves_nothing(site):
    site.hub.held = WEIGHTS
    downloads = f"GET /org/tiny/resolve/{site.hub.commits['models/org/tiny']['main'].sha}/unet/{WEIGHTS}"
    site.killed_when(lambda: downloads in site.hub.requests)
    assert not site.store.exists()


@pytest.mark.process
@pytest.mark.long
def test_a_kill_while_it_copies_leaves_nothing_that_counts(site):
    site.killed_when(lambda: any((site.store / "inputs").glob(".*")))
    (left,) = folders(site.store)
    assert left.startswith(".")
    assert made(site.store, spec("whole", teacher=TINY), hub=site.hub)[0] == []
    (whole,) = prefetch.read(RunPaths(site.store / "whole"))
    assert folders(site.store) == [whole.digest], "the next use of the same input removes what the killed process left"
    assert len(folder_bytes(whole.content(site.store))) == 5
    left = site.store / "inputs" / left
    left.mkdir()
    assert prefetch.unused(site.store) == [], "it may be at work still"
    os.utime(left, (0, 0))
    assert prefetch.unused(site.store) == [left]


@pytest.mark.process
@pytest.mark.long
def test_two_at_once_lose_nothing(site):
    with site.start("one") as one, site.start("two") as two:
        said = [process.communicate(timeout=300)[0] for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], said
    of_one, of_two = (prefetch.read(RunPaths(site.store / name)) for name in ("one", "two"))
    assert of_one == of_two
    assert folders(site.store) == [of_one[0].digest]
    files = folder_bytes(of_one[0].content(site.store))
    served = site.hub.commits["models/org/tiny"]["main"].files
    assert files == {name: served[name] for name in served if name.endswith((".json", ".safetensors", "README.md"))}


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
"""


@pytest.mark.process
@pytest.mark.long
def test_a_file_that_cannot_be_written_ends_it_and_nothing_is_kept(site):
    cached = "from huggingface_hub import snapshot_download; snapshot_download('org/tiny')\n"
    work = site.store.parent / "work"
    arguments = [str(site.store), json.dumps([spec("one", teacher=TINY)])]
    done = python(cached + LIMITED + MAKE, *arguments, hub=site.hub, cwd=work)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert said.startswith(f"RunError cannot write {site.store / 'inputs'}/")
    assert said.endswith(": File too large; nothing of it was kept")
    assert folders(site.store) == []
    assert not (site.store / "one").exists()


# --- of a run ---


def kept(store: Path, name: str, what: str = "teacher") -> Input:
    """An input that lies in the store."""
    one = Input(what, f"org/{name}", None, "c" * 40, name * 64, f"hub/models--org--{name}/snapshots/{'c' * 40}")
    one.content(store).mkdir(parents=True)
    write_atomic(one.folder(store) / "input.json", '{"bytes": 5}')
    return replace(one, bytes=5)


def test_a_run_that_goes_on_keeps_its_commits(tmp_path, capfd):
    """What was fetched lies there, so that nothing is asked of the hub, which no test can reach."""
    commit = "c" * 40
    digest = hashlib.sha256(json.dumps(["teacher", "org/tiny", commit, *by_id.FILES]).encode()).hexdigest()
    link = f"hub/models--org--tiny/snapshots/{commit}"
    before = Input("teacher", "org/tiny", "v2", commit, digest, link, 5)
    before.content(tmp_path).mkdir(parents=True)
    write_atomic(before.folder(tmp_path) / "input.json", '{"bytes": 5}')
    os.utime(before.folder(tmp_path), (0, 0))
    given = RunSpec.model_validate(spec("one", teacher=TINY | {"revision": "v2"}))
    assert given.hub_inputs == {"teacher"}
    assert prefetch.resolve(given, tmp_path, [before]) == [before]
    assert capfd.readouterr().err == f"teacher org/tiny@cccccccccccc: 5 B in {tmp_path}/inputs/{digest}\n"
    assert prefetch.unused(tmp_path) == [], "it was asked for lately"


def test_a_spec_without_hub_ids_has_no_inputs(tmp_path):
    given = RunSpec.model_validate(spec("one", teacher={"kind": "diffusers", "path": str(tmp_path)}))
    assert prefetch.resolve(given, tmp_path / "store") == []
    assert not (tmp_path / "store").exists()
    assert given.hub_inputs == set()
    assert prefetch.environment(set(), tmp_path) == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_no_run_is_called_as_the_folder_of_inputs(tmp_path):
    with pytest.raises(InputError, match="a run cannot be called 'inputs': the store uses that folder for files f"):
        make_run(tmp_path, "inputs")
    with pytest.raises(InputError, match="a run cannot be called 'registry': the store uses that folder for published"):
        make_run(tmp_path, "registry")
    assert list(tmp_path.iterdir()) == []


def test_links_are_relative_and_made_again_where_they_are_gone(tmp_path):
    run, one = make_run(tmp_path), kept(tmp_path, "a")
    prefetch.link(run)
    assert not (run.root / "inputs").exists(), "a run without inputs"
    (run.root / "inputs").mkdir()
    write_atomic(run.root / prefetch.RECORD, prefetch.record([one])[prefetch.RECORD])
    prefetch.link(run)
    link = run.root / "inputs" / one.link
    assert str(link.readlink()) == f"../../../../../inputs/{'a' * 64}/content"
    assert (link.parent.parent / "refs" / "main").read_text() == one.commit
    link.unlink()
    link.symlink_to("nowhere")
    prefetch.link(run)
    assert link.resolve() == one.content(tmp_path).resolve()
    shutil.rmtree(one.folder(tmp_path))
    with pytest.raises(RunError, match="the teacher org/a@cccccccccccc is no longer in .*/inputs/a{64}; submit the"):
        prefetch.link(run)


def test_unused_is_what_no_run_names_and_nobody_asked_for_lately(tmp_path):
    assert prefetch.unused(tmp_path) == []
    run, used, old, new = make_run(tmp_path), *(kept(tmp_path, name) for name in "abc")
    (run.root / "inputs").mkdir()
    write_atomic(run.root / prefetch.RECORD, prefetch.record([used])[prefetch.RECORD])
    (tmp_path / "inputs" / "link").symlink_to("nowhere")
    (tmp_path / "inputs" / "file").write_text("")
    os.utime(tmp_path / "inputs" / "file", (0, 0))
    for each in (used, old):
        os.utime(each.folder(tmp_path), (time.time() - 2 * DAY,) * 2)
    assert prefetch.unused(tmp_path) == [old.folder(tmp_path)]
    assert new.folder(tmp_path).exists()
    assert read_json(run.root / prefetch.RECORD)[0]["digest"] == used.digest


# Of a list of inputs: what somebody wrote into it, and what is said of that.
WRONG = [
    ("what", "other", "0.what: \"other\" given; input should be 'teacher' or 'data'"),
    ("digest", "../../elsewhere", "0.digest: "),
    ("digest", "A" * 64, "0.digest: "),
    ("commit", "../c", "0.commit: "),
    ("link", "../../../../hub", "0.link: "),
    ("link", "hub/models--../../snapshots/" + "c" * 40, "0.link: "),
    ("link", "datasets/fetched/a/../b", "0.link: "),
    ("revision", "../../../../main", '0.revision: "../../../../main" given; must be a relative path without . and ..'),
    ("revision", "/main", '0.revision: "/main" given; must be a relative path without . and ..'),
    ("id", 5, "0.id: 5 given; input should be a valid string"),
]


@pytest.mark.parametrize(("field", "value", "said"), WRONG)
def test_a_list_of_inputs_leads_nowhere_else(tmp_path, field, value, said):
    run, one = make_run(tmp_path / "runs"), kept(tmp_path / "runs", "a")
    (run.root / "inputs").mkdir()
    (run.root / prefetch.RECORD).write_text(json.dumps([asdict(one) | {field: value}]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"inputs\.json cannot be read .*; start a new run with another name") as info:
        prefetch.link(run)
    assert said in str(info.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_list_that_cannot_be_read_is_warned_of_and_keeps_what_it_may_need(tmp_path, capfd):
    run, named, old, ancient = make_run(tmp_path), *(kept(tmp_path, name) for name in "abc")
    (run.root / "inputs").mkdir()
    write_atomic(run.root / prefetch.RECORD, json.dumps([{"digest": named.digest}]))
    for each, days in ((named, 9), (ancient, 9), (old, 2)):
        os.utime(each.folder(tmp_path), (time.time() - days * DAY,) * 2)
    for path in run.root.iterdir():
        os.utime(path, (time.time() - 3 * DAY,) * 2)
    assert prefetch.unused(tmp_path) == [ancient.folder(tmp_path)]
    said = f"warning: {run.root}/{prefetch.RECORD} cannot be read (0.what: is missing); start a new run with another "
    assert capfd.readouterr().err == said + "name; inputs that this run may need are kept\n"
    (run.root / prefetch.RECORD).unlink()
    os.mkfifo(run.root / prefetch.RECORD)
    assert prefetch.unused(tmp_path) == [each.folder(tmp_path) for each in (named, ancient)], "nothing waits for it"


@pytest.mark.parametrize("damage", ["{}", "", '{"bytes": -1}', "fifo", "no content"])
def test_an_input_that_is_not_whole_is_fetched_under_another_name(tmp_path, capfd, damage):
    one = kept(tmp_path, "a")
    record = one.folder(tmp_path) / "input.json"
    if damage == "fifo":
        record.unlink()
        os.mkfifo(record)
    elif damage == "no content":
        one.content(tmp_path).rmdir()
    else:
        record.write_text(damage)
    needs, download = (lambda store: []), (lambda: lambda folder: folder.mkdir(parents=True))
    asked = Repository("teacher", "org/a", None, one.commit, [], one.link, needs, download)
    found = prefetch._in_store(one, tmp_path, asked)
    assert found.digest != one.digest and found.content(tmp_path).is_dir()
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {one.folder(tmp_path)} is incomplete (input.json: ")
    assert said.endswith("; the teacher org/a@cccccccccccc is downloaded again to another folder\n")
    assert prefetch._in_store(one, tmp_path, replace(asked, download=lambda: pytest.fail("fetched"))) == found, (
        "it is there now"
    )
    assert one.folder(tmp_path).exists(), "a run may use it"
