"""Worker processes that prepare batches: the same batches as without them, and how they end."""

import json
import os
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import command
from PIL import Image
from runs import alive, distill, kill, start, wait_for

from distill import data, pairs
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.core.versions import DRAWS
from distill.data import DataSource, timing
from distill.data.decoding import decode
from distill.execution import batches, devices
from distill.flow.conditioning import ConditionTable, HeldRows
from distill.flow.draws import Rows
from distill.launch import environment
from distill.protocols import Batch
from distill.runs import progress as progress_module
from distill.runs.progress import Progress
from distill.runs.run_store import CREATED, RunPaths, create_run, event_line, read_events
from distill.spec import checks, specfile
from distill.spec.model import GaussianTeacher, ImagesData, LaunchSpec, PairsStage, TrainStage
from distill.teachers.analytic import gaussian_teacher
from distill.training import checkpoint, loading

ALL = Rows(0, 12, 12)


def parts(batch):
    """The tensors of a batch, by name."""
    found = {"data": batch.data, **batch.cond, **{f"data.{name}": each for name, each in batch.data_cond.items()}}
    if batch.pairs is not None:
        found |= {f"pairs.{name}": each for name, each in vars(batch.pairs).items()}
    return {name: each for name, each in found.items() if each is not None}


def same(a, b):
    a, b = parts(a), parts(b)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def children(pid):
    """The children of all threads of a process."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has just ended
            found += [int(n) for n in (thread / "children").read_text().split()]
    return found


def data_workers(pid):
    """The children that DataLoader has started."""
    return [each for each in children(pid) if b"pt_data_worker" in Path(f"/proc/{each}/comm").read_bytes()]


def make_images(root, count=30, classes=3):
    numbers = np.random.default_rng(1)
    for i in range(count):
        folder = root / str(i % classes)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return root


def load(root, **changes):
    spec = ImagesData(kind="images", path=str(root), size=8, crop="random", flip=True, **changes)
    return data.load_data(spec, 5, keep=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")


# --- without processes ---


def test_micro_batches_follow_each_other_from_any_place():
    keys = loading._keys(7, Rows(8, 10, 16), Rows(4, 12, 16))
    assert [(step, rows.start, rows.stop) for step, rows in (next(keys) for _ in range(6))] == [
        (7, 8, 10), (7, 10, 12), (8, 4, 6), (8, 6, 8), (8, 8, 10), (8, 10, 12)
    ]  # fmt: skip
    share = Rows(4, 12, 16)
    given = [Rows(4, 12, 16), Rows(6, 8, 16), Rows(5, 7, 16), Rows(4, 7, 16), Rows(0, 4, 16), Rows(4, 8, 12)]
    assert [loading._is_part(rows, share) for rows in given] == [True, True, False, False, False, False]


def test_without_workers_a_source_is_used_as_it_is(images):
    source = DataSource(load(images), 12, 0)
    with loading.opened(source, 0, ALL) as found:
        assert found is source


class Tricky:
    """A source that warns, or raises an error, at some steps."""

    def batch(self, step, rows):
        if step == 1:
            warnings.warn("a library has something to say", stacklevel=1)
        if step == 2:
            raise InputError("the file is bad; repair it")
        if step == 3:
            raise RunError("the file is gone; restore it, then resume")
        return Batch(torch.full((rows.stop - rows.start,), float(step)), None, {})


def test_a_delivery_has_the_batch_or_the_error_and_what_was_warned_of():
    found = [loading._Batches(Tricky(), None)[step, ALL] for step in range(4)]
    assert [each.warned for each in found] == [[], ["a library has something to say"], [], []]
    assert [str(each.error) for each in found] == [
        "None", "None", "the file is bad; repair it", "the file is gone; restore it, then resume"
    ]  # fmt: skip
    assert torch.equal(found[1].batch.data, torch.ones(12)) and found[2].batch is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "DataLoader worker (pid 12) is killed by signal: Killed. ",
            "a worker process (pid 12) that reads data was ended by a signal: Killed (out of memory?); what was saved "
            "is intact; resume the run; fewer launch.workers need less memory",
        ),
        (
            "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "a worker process (pid 12) that reads data ran out of shared memory; what was saved is intact; resume the "
            "run, with a larger /dev/shm (containers: --shm-size, or --ipc=host), or with fewer launch.workers",
        ),
        (
            "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
            "a worker process (pid 12, 13) that reads data ended unexpectedly; what was saved is intact; "
            "resume the run",
        ),
    ],
)
def test_the_end_of_a_worker_is_one_clear_error(text, told):
    with pytest.raises(RunError) as error, loading.opened(Tricky(), 1, ALL):
        raise RuntimeError(text)
    assert str(error.value) == told
    with pytest.raises(RuntimeError, match="^another$"), loading.opened(Tricky(), 1, ALL):
        raise RuntimeError("another")


def test_the_number_of_workers_is_that_of_the_free_cpus(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cuda = torch.device("cuda")

    def chosen(cpus, procs=1, device=cuda, **launch):
        monkeypatch.setattr(environment, "cpus", lambda: cpus)
        return devices.workers(LaunchSpec(procs=procs, **launch), device)

    assert [chosen(1), chosen(2), chosen(6), chosen(64)] == [0, 1, 5, 8]
    assert [chosen(16, procs=4), chosen(4, procs=8)] == [3, 0]
    assert [chosen(64, device=torch.device("cpu")), chosen(2, workers=5), chosen(64, workers=0)] == [0, 5, 0]
    assert chosen(64, device=torch.device("cpu"), workers=3) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")  # of each process
    assert [chosen(16, procs=4), chosen(2, procs=4)] == [3, 1]


SPEC = {
    "name": "one",
    "data": {"kind": "images", "path": "images", "size": 8, "crop": "random", "flip": True},
    "stages": {
        "teach": {
            "kind": "train",
            "recipe": "pretrain/flow_matching",
            "network": {"kind": "unet", "channels": [32], "dropout": 0.1},
            "images": 240,
            "batch_size": 8,
            "checkpoint": {"images": 8, "minutes": None},
        }
    },
    "launch": {"threads": 1, "micro_batch": 4},
}


def test_workers_are_a_setting_of_the_launch_and_need_a_train_stage(images):
    content = {**SPEC, "data": {**SPEC["data"], "path": str(images)}}
    spec = specfile.validate(content, "spec")
    more = specfile.validate({**content, "launch": {**content["launch"], "workers": 3}}, "spec")
    assert spec.digest() == more.digest() and spec.launch.workers is None
    with pytest.raises(InputError, match="^spec: launch.workers: -1 given; must be at least 0$"):
        specfile.validate({**content, "launch": {"workers": -1}}, "spec")
    only_pairs = {
        "name": "one",
        "teacher": {"kind": "gaussian", "mean": [0.0], "std": [1.0]},
        "stages": {"pairs": {"kind": "pairs", "count": 4, "block": 4, "shard": 4, "steps": 1}},
        "launch": {"workers": 2},
    }
    with pytest.raises(InputError, match="launch.workers: 2 given, but it applies to training, and no stage trains"):
        checks.check(specfile.validate(only_pairs, "spec"), Path())


def test_waiting_for_data_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with Progress("teach", 1000, "images", RunPaths(tmp_path)) as progress:
        for waited, seconds in ((3.0, 10), (0.05, 10), (20.0, 10)):
            clock[0] += seconds
            progress.waited(waited)
            progress.update(progress.done + 100, {"loss": 1.0})
    lines = [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "teach  100/1,000 images  10.0 images/s  ETA 1:30  data 30 %  loss 1",
        "teach  200/1,000 images  10.0 images/s  ETA 1:20  loss 1",
        "teach  300/1,000 images  10.0 images/s  ETA 1:10  data 100 %  loss 1",
    ]
    assert [event["waiting"] for event in read_events(RunPaths(tmp_path))] == [0.3, 0.005, 1.0]

    with Progress("teach", 1000, "images", RunPaths(tmp_path)) as progress:
        for waited, seconds in ((20.0, 100), (0.0, 100)):
            clock[0] += seconds
            progress.waited(waited)
            progress.update(progress.done + 500, {})
    told = "note: 10 % of the time was spent waiting for data; `distill doctor --data SPEC` says how many worker "
    told += "processes (launch.workers) would be enough"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"  {told}")
    assert list(read_events(RunPaths(tmp_path)))[-1]["text"] == told

    ticks = iter([0.0, 2.0, 10.0, 11.5])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(ticks))
    timed = loading.TimedSource(Tricky())
    assert torch.equal(timed.batch(0, ALL).data, torch.zeros(12))
    timed.batch(0, ALL)
    assert [timed.take(), timed.take()] == [3.5, 0.0]


def test_damage_found_by_workers_is_counted_once(images, monkeypatch, capfd):
    found = load(images, max_unreadable=2)
    found.skip([3, 4])
    found.skip([4])
    assert found.skipped == [3, 4] and found.unusable(0) == (2, [])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "images: 2 of 30 images cannot be decoded and are skipped: " in said[0]
    with pytest.raises(InputError, match=r"images: 3 of 30 images cannot be decoded: .*max_unreadable \(now 2\)"):
        found.skip([3, 5])


# --- how many workers are needed ---


def test_the_number_of_workers_is_rate_times_the_time_of_a_sample():
    found = timing.ReadingTime("an image", 0.004)
    assert [found.workers(rate) for rate in (1, 7.5, 8, 250, 251, 1000)] == [0, 0, 1, 1, 2, 4]
    read = []
    seconds = timing._measured(lambda step: [read.append(step), time.sleep(0.01)], 2, seconds=0.03)
    assert read == list(range(len(read))) and 2 <= len(read) <= 4 and seconds >= 0.005
    encoded = timing.example(64)
    assert encoded == timing.example(64) != timing.example(64, 1)
    assert decode(encoded, "", (64, 64), 3).shape == (3, 64, 64) and decode(encoded, "", (64, 64), 3).std() > 20


def test_the_doctor_measures_reading_and_says_how_many_workers_gpus_need(images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "cpus", lambda: 4)
    monkeypatch.setattr(timing, "_measured", lambda read, count, seconds=3.0: [read(0), 0.0039][1])
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "data": {**SPEC["data"], "path": str(images)}}))

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(
        {**SPEC, "data": {"kind": "prompts", "path": str(tmp_path / "prompts.txt")}}
    ))  # fmt: skip

    def rows(*words):
        done = command(capfd, "doctor", "--json", *words)
        found = {each["what"]: each for each in json.loads(done.out)}
        return [[found[what][key] for key in ("state", "found", "fix")] for what in ("reading data", "workers per GPU")]

    assert rows("--gpus", "2") == [
        ["ok", "a 512x512 JPEG: 3.9 ms, 256 a second", "measure your data: --data SPEC"],
        ["ok", "1 for 100, 2 for 300, 4 for 1,000 samples a second and GPU; 2 GPUs: 2, 4, 8 (4 CPUs here)",
         "give the rate of your GPU: --rate"],
    ]  # fmt: skip
    assert not any(tmp_path.glob("runs"))
    assert rows("--data", "spec.yaml", "--rate", "500", "--gpus", "1") == [
        ["ok", "a sample of 'images': 3.9 ms, 256 a second", ""],
        ["ok", "2 for 500 samples a second and GPU (4 CPUs here)", "launch.workers=2"],
    ]
    assert rows("--data", "spec.yaml", "--rate", "500", "--gpus", "3")[1] == [
        "note", "2 for 500 samples a second and GPU; 3 GPUs: 6 (4 CPUs here)",
        "launch.workers=2; there are too few CPUs: `distill cache SPEC` stores data that is quick to read",
    ]  # fmt: skip
    for words, told in (
        (["--data", "nope"], "there is no spec file and no preset 'nope'; "),
        (["--data", "mixture-2d"], "--data: the spec has no data (data.kind: none); give a spec with data"),
        (["--data", "prompts.yaml"], "--data: the spec has only prompts (data.kind: prompts); give a spec with images"),
        (["--site", "--rate", "2"], "--rate has no effect with --site; remove it"),
    ):
        done = command(capfd, "doctor", *words)
        assert done.code == 2 and told in done.err


def test_the_doctor_says_which_package_is_missing_to_read_data(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def find(*given):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(timing, "of_data", find)
    done = command(capfd, "doctor", "--json", "--data", "digits")
    found = {each["what"]: each for each in json.loads(done.out)}["reading data"]
    assert (done.code, done.err) == (1, "")
    assert [found["state"], found["found"], found["fix"]] == [
        "missing", "not measured: the package datasets is missing", "pip install 'distill[train]'",
    ]  # fmt: skip


# --- with processes ---


TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.7, -1.0], std=[0.5, 2.0]))


def sources(kind, images, folder):
    """Sources of a kind, each with data of its own, so that one does not know what another has found."""
    run = RunPaths(folder)
    shares = {"pairs": "pairs"} if kind in ("pairs", "both") else {}
    stage = TrainStage(kind="train", recipe="reflow/reflow", images=120, batch_size=12, **shares)
    if shares and not run.stage("pairs").pairs.exists():
        made = PairsStage(kind="pairs", count=20, solver="euler", steps=1, block=4, shard=4)
        with Progress("pairs", 20, "pairs", None) as progress:
            pairs.generate(
                TEACHER, made, run.stage("pairs").pairs, seed=5, device=torch.device("cpu"), progress=progress,
                stop=StopRequest(),
            )  # fmt: skip
    rows = {"prompt": torch.arange(12.0).view(3, 2, 2)}
    table = ConditionTable(HeldRows(rows), constants={"scale": torch.tensor([2.0])})
    while True:
        found = load(images) if kind != "pairs" else None
        conditioning = TEACHER.conditioning if kind == "pairs" else table
        yield batches.of_stage(run, stage, seed=9, data=found, conditioning=conditioning, teacher_digest=None)[0]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["data", "pairs", "both"])
def test_batches_are_the_same_with_any_number_of_workers(kind, images, tmp_path, capfd):
    """Of one of two ranks: from the beginning, again with other micro-batches, and from the middle after a resume."""
    made = sources(kind, images, tmp_path)
    plain, state = next(made), torch.random.get_rng_state()
    asked = [(step, Rows(start, start + 2, 12)) for step in (0, 1) for start in (6, 8, 10)]
    asked += [(step, Rows(start, start + 3, 12)) for step in (0, 1, 2, 7, 8, 9) for start in (6, 9)]
    asked += [(3, Rows(0, 3, 12)), (4, ALL)]  # not of this rank
    expected = [plain.batch(step, rows) for step, rows in asked]
    assert len(parts(expected[0])) == {"data": 3, "pairs": 2, "both": 5}[kind]
    for workers in (1, 2):
        with loading.opened(next(made), workers, Rows(6, 12, 12)) as source:
            assert all(
                same(source.batch(step, rows), batch) for (step, rows), batch in zip(asked, expected, strict=True)
            )
            pids = data_workers(os.getpid())
            assert len(pids) == workers
        assert not any(map(alive, pids))
    assert torch.equal(torch.random.get_rng_state(), state)  # dropout uses it
    assert "warn" not in capfd.readouterr().err.lower()


class Large:
    """A source with 256 MB, all of which each batch reads."""

    def __init__(self):
        self.rows = torch.ones(64, 1024, 1024)

    def batch(self, step, rows):
        return Batch(self.rows.sum((1, 2))[rows.start : rows.stop], None, {})


@pytest.mark.process
def test_workers_share_the_memory_of_the_data():
    with loading.opened(Large(), 1, ALL) as source:
        assert source.batch(0, ALL).data.tolist() == [2**20] * 12
        (worker,) = data_workers(os.getpid())
        private = dict(line.split(":") for line in Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:])
    assert sum(int(private[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) < 150_000  # KiB


@pytest.mark.process
def test_errors_and_warnings_of_workers_arrive_in_order(tmp_path, capfd):
    with loading.opened(Tricky(), 2, ALL) as source:
        for _ in range(2):
            assert [source.batch(step, ALL).data[0].item() for step in (0, 1)] == [0.0, 1.0]
            with pytest.raises(InputError, match="^the file is bad; repair it$"):
                source.batch(2, ALL)
            with pytest.raises(RunError, match="^the file is gone; restore it, then resume$"):
                source.batch(3, ALL)
        assert source.batch(4, ALL).data[0].item() == 4.0
    assert capfd.readouterr().err.count("warning: a library has something to say\n") == 1

    root = make_images(tmp_path / "images")
    for path in (root / "0" / "00.png", root / "1" / "01.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + bytes(len(whole) - 80) + whole[-20:])  # damaged in the middle, with its end
    found = load(root, max_unreadable=2)
    with loading.opened(DataSource(found, 12, 0), 2, ALL, data=found) as source:
        given = [source.batch(step, ALL) for step in range(6)]
    said = capfd.readouterr().err.splitlines()
    assert len(said) <= 2 and said[-1].startswith("warning: images: 2 of 30 images cannot be decoded and are skipped: ")
    assert found.unusable(0) == (2, []) and sorted(found.skipped) == [0, 10]
    plain = DataSource(load(root, max_unreadable=2), 12, 0)
    assert all(same(batch, plain.batch(step, ALL)) for step, batch in enumerate(given))
    found = load(root, max_unreadable=1)
    with (
        pytest.raises(InputError, match=r"2 of 30 images cannot be decoded: .*max_unreadable \(now 1\)"),
        loading.opened(DataSource(found, 12, 0), 2, ALL, data=found) as source,
    ):
        for step in range(6):
            source.batch(step, ALL)


def make_run(folder, name, **launch):
    """A run of SPEC of which nothing is done yet."""
    content = {**SPEC, "name": name, "launch": {**SPEC["launch"], **launch}}
    content["data"] = {**SPEC["data"], "path": str(folder / "images")}
    spec = specfile.validate(content, "spec")
    files = {
        "spec.yaml": yaml.safe_dump(spec.model_dump(mode="json")),
        "env.json": json.dumps({"threads": 1, "draws": DRAWS}),
        CREATED: event_line("created", digest=spec.digest(), stages={"teach": "train"}),
    }
    return create_run(folder / "runs", name, files)


def begin(run, folder):
    """A process that trains a run, once it has saved a step, and its workers."""

    def newest():
        return max(checkpoint.complete(run.stage("teach").checkpoints), default=None)

    before = newest()
    process = start("stage", str(run.root), "teach", cwd=folder, log=folder / "log")
    assert wait_for(lambda: newest() != before, process), (folder / "log").read_text()
    workers = children(process.pid)
    assert len(workers) == 2
    return process, workers


def gone(pids):
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.process
def test_a_run_with_workers_is_stopped_and_killed_and_makes_the_same_student(tmp_path):
    make_images(tmp_path / "images")
    plain, run, log = make_run(tmp_path, "plain", workers=0), make_run(tmp_path, "loaded", workers=2), tmp_path / "log"
    done = distill("stage", str(plain.root), "teach", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    process, workers = begin(run, tmp_path)
    assert kill(process, signal.SIGINT) == 75, log.read_text()  # Ctrl-C reaches the workers too
    assert "resume with: distill run runs/loaded --resume" in log.read_text() and "Traceback" not in log.read_text()
    assert log.read_text().count("SIGINT") == 2  # when it came, and at the end
    assert gone(workers)

    process, workers = begin(run, tmp_path)
    process.send(signal.SIGKILL)
    process.end()
    assert gone(workers)

    log.unlink()
    process, workers = begin(run, tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    assert process.end() == 1
    told = f"a worker process (pid {workers[0]}) that reads data was ended by a signal: Killed (out of memory?)"
    assert log.read_text().count(told) == 1 and "Traceback" not in log.read_text()
    assert gone(workers)
    assert [event["message"] for event in read_events(run) if event["event"] == "failed"][0].startswith("RunError: a w")

    done = distill("stage", str(run.root), "teach", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (each for each in plain.student("teach").rglob("*.safetensors")):
        assert path.read_bytes() == (run.student("teach") / path.relative_to(plain.student("teach"))).read_bytes()
    assert any("waiting" in event for event in read_events(run) if event["event"] == "progress")
