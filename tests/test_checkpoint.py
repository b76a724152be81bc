"""Checkpoints: complete or absent, verified, kept, and the messages if one cannot be read or written."""

import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from programs.train_vector import averages, train

from distill.core import space
from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.spec.model import CheckpointSpec
from distill.training import checkpoint
from distill.training.checkpoint import Checkpoints, complete, differences, latest, weights
from distill.training.parts import RankParts
from distill.training.saving import Saver


def make(folder, warn=None, *, keep=2, images=None, minutes=None, settings=None):
    spec = CheckpointSpec(keep=keep, images=images, minutes=minutes)
    return Checkpoints(folder, spec, settings or {"seed": 0}, {"threads": 1}, warn or refuse_warning)


def save(checkpoints, step, images, groups):
    """Until it is on the disk."""
    saver = Saver(checkpoints, lambda saved: None)
    saver.save(step, images, [(name, RankParts(tensors)) for name, tensors in groups])
    saver.finish()
    return checkpoints.last


def refuse_warning(text):
    raise AssertionError(text)


def groups(value, size=1000):
    yield "network.student", {"w": torch.full((size,), float(value)), "n": torch.tensor(value)}
    yield "optimizer.student", {"w/exp_avg": torch.full((size,), -float(value))}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    half = torch.randn(2, 3, 4).to(torch.bfloat16)
    tied = torch.randn(5)
    tensors = {"half": half, "strided": torch.arange(6.0).reshape(2, 3).T, "a": tied, "b": tied, "none": torch.ones(0)}
    saver = make(tmp_path / "checkpoints", settings={"seed": 7, "stage": {"betas": (0.9, 0.99)}})
    save(saver, 12, 345, [("network.student", tensors)])
    found = latest(tmp_path / "checkpoints", refuse_warning)
    assert (found.path.name, found.meta.step, found.meta.images) == ("step-00000012", 12, 345)
    assert found.meta.settings == {"seed": 7, "stage": {"betas": [0.9, 0.99]}}
    loaded = found.tensors("network.student")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    with pytest.raises(RunError, match=r"step-00000012 has no 'network\.critic'; it has network\.student"):
        found.tensors("network.critic")


def test_the_newest_are_kept_and_nothing_else_lies_about(tmp_path):
    saver = make(tmp_path, keep=3)
    for step in (1, 2, 30, 100_000_000, 99_999_999):
        save(saver, step, step, groups(step))
    assert names(tmp_path) == ["step-00000030", "step-100000000", "step-99999999"]
    assert [path.name for path in complete(tmp_path)] == ["step-100000000", "step-99999999", "step-00000030"]


def test_leftovers_of_kills_are_cleared_and_other_files_are_not(tmp_path):
    save(make(tmp_path), 3, 48, groups(3))
    elsewhere = replace(Owner.this(), host="elsewhere").label  # the run is ours now, wherever it was executed before
    hidden = (f".step-00000004.tmp-0123abcd-{elsewhere}", f".step-00000002.tmp-0123abcd-{Owner.this().label}")
    for name in ("step-00000004.tmp-123", "step-00000002.trash-99", *hidden):
        shutil.copytree(tmp_path / "step-00000003", tmp_path / name)
    (tmp_path / "step-00000004.tmp-123" / "meta.json").unlink()
    (tmp_path / "notes").mkdir()
    assert make(tmp_path).resume().meta.step == 3
    assert names(tmp_path) == ["notes", "step-00000003"]


def test_leftovers_that_cannot_be_cleared_are_one_message(tmp_path):
    good = save(make(tmp_path), 3, 48, groups(3))
    odd = tmp_path / "step-00000004.tmp-123"
    odd.write_text("a file, where a kill leaves a folder")
    with pytest.raises(RunError, match=f"cannot delete {odd}: Not a directory; last good checkpoint: {good}"):
        make(tmp_path).resume()


def test_there_is_nothing_to_resume_at_first(tmp_path):
    assert make(tmp_path / "checkpoints").resume() is None
    (tmp_path / "checkpoints").mkdir()
    assert make(tmp_path / "checkpoints").resume() is None


def flip(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda d: flip(d / "network.student.safetensors"), r"network\.student\.safetensors: wrong checksum"),
    "truncated": (
        lambda d: (d / "optimizer.student.safetensors").write_bytes(b"x" * 100),
        r"optimizer\.student\.safetensors: 100 bytes instead of 4,080",
    ),
    "missing": (
        lambda d: (d / "network.student.safetensors").unlink(),
        r"network\.student\.safetensors: No such file or directory",
    ),
    "no meta": (lambda d: (d / "meta.json").unlink(), r"meta\.json: No such file or directory"),
    "half a meta": (lambda d: (d / "meta.json").write_text('{"format": 1,'), r"meta\.json: Invalid JSON.*"),
    "edited meta": (
        lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"images": 200', '"images": 300')),
        r"meta\.json: wrong checksum",
    ),
    "other format": (
        lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"format": 1', '"format": 3')),
        r"meta\.json: Input should be 1 or 2",
    ),
    "empty": (lambda d: [f.unlink() for f in d.iterdir()], r"meta\.json: No such file or directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    saver = make(tmp_path)
    save(saver, 1, 100, groups(1))
    newest = save(saver, 2, 200, groups(2))
    damage(newest)
    said = []
    assert latest(tmp_path, said.append).meta.step == 1
    [text] = said
    assert re.fullmatch(rf"checkpoint {newest} is damaged \({reason}\); going back to step-00000001", text)
    of_optimizer = kind == "truncated"  # whose files an export does not need
    assert weights(tmp_path, warn=said.append)[0]["n"] == (2 if of_optimizer else 1)

    again = make(tmp_path, said.append, keep=1)
    assert again.resume().path.name == "step-00000001"
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]  # no longer the newest, not yet deleted
    save(again, 2, 200, groups(5))  # the same step once more
    assert names(tmp_path) == ["step-00000002"]
    assert latest(tmp_path, refuse_warning).tensors("network.student")["n"] == 5


def test_weights_are_read_where_only_other_files_are_damaged(tmp_path):
    """An export needs one group, and reads the others not even for their checksums."""
    saver = make(tmp_path)
    save(saver, 1, 100, groups(1))
    newest = save(saver, 2, 200, groups(2))
    flip(newest / "optimizer.student.safetensors")
    assert weights(tmp_path, warn=refuse_warning)[0]["n"] == weights(tmp_path, step=2)[0]["n"] == 2
    assert latest(tmp_path, lambda text: None).meta.step == 1
    flip(newest / "network.student.safetensors")
    assert weights(tmp_path, warn=lambda text: None)[0]["n"] == 1
    with pytest.raises(InputError, match=r"damaged \(network\.student\.safetensors: wrong checksum\); choose another"):
        weights(tmp_path, step=2)


def test_all_damaged_is_an_error_and_never_step_zero(tmp_path):
    saver = make(tmp_path)
    for step in (1, 2):
        flip(save(saver, step, step, groups(step)) / "network.student.safetensors")
    message = (
        rf"every checkpoint in {tmp_path} is damaged \(step-00000002: network\.student\.safetensors: wrong checksum; "
        r"step-00000001: .*\); restore one from a backup, or remove that folder to start this stage again from step 0"
    )
    with pytest.raises(RunError, match=message):
        make(tmp_path).resume()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_when_saving_is_due(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    saver = make(tmp_path, images=100, minutes=2.0)
    assert [saver.due(n) for n in (0, 99, 100, 250)] == [False, False, True, True]
    save(saver, 1, 130, groups(1))
    assert [saver.due(n) for n in (199, 200)] == [False, True]
    now = 119.9
    assert not saver.due(130)
    now = 120.0
    assert saver.due(130)
    save(saver, 2, 130, groups(1))
    assert not saver.due(130)
    never = make(tmp_path)
    now = 1e9
    assert not never.due(10**12)


def test_differences_name_the_field():
    old = {"seed": 1, "stage": {"images": 5, "clip": None, "gone": "x"}}
    new = {"seed": 1, "stage": {"images": 6, "clip": 1.0}}
    assert differences(old, new) == [
        "stage.images: 5 -> 6",
        "stage.clip: null -> 1.0",
        'stage.gone: "x" -> null',
    ]


def test_weights_for_export(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint in .*checkpoints yet; wait for the first one"):
        weights(tmp_path / "stages/train/checkpoints")
    result = train(tmp_path)
    folder = tmp_path / "stages/train/checkpoints"
    for half_life, expected in (
        (None, result.roles.networks["student"].state_dict()),
        *averages(result.roles).items(),
    ):
        given, images = weights(folder, half_life=half_life)
        assert images == 128
        assert given.keys() == expected.keys() and all(torch.equal(given[k], expected[k]) for k in expected)
    with pytest.raises(
        InputError, match=r"has no 'ema\.student\.5\.0'; it has ema\.student\.1000\.0, ema\.student\.64\.0"
    ):
        weights(folder, half_life=5.0)
    with pytest.raises(InputError, match=r"has no 'network\.critic'; it has .*network\.student, optimizer\.student"):
        weights(folder, "critic")


def assert_survives_a_full_disk(folder, error):
    """`folder` has room for a few checkpoints; then there is one message, and the last good one loads."""
    with pytest.raises(RunError) as caught:
        train(folder, images=1024, checkpoint={"images": 16, "minutes": None, "keep": 100})
    here = folder / "stages/train/checkpoints"
    good = latest(here, refuse_warning)
    step = good.meta.step
    assert 0 < step < 64
    assert str(caught.value) == (
        f"cannot save checkpoint {here}/step-{step + 1:08d}: {error}; last good checkpoint: {good.path}"
    )
    assert not [name for name in names(here) if ".tmp" in name]
    assert weights(here)[0].keys() == {f"layers.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")} | {"calls"}


@contextmanager
def files_limited_once(condition):
    """No file of this process may be longer than 1 kB from when `condition()` holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    left = threading.Event()

    def watch():
        while not left.is_set() and not condition():
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.process
def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.core.space.free", lambda folder: 1 << 40)  # as where a quota is not to be read
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:  # not root: files that may not grow any more stand in for the disk
        with files_limited_once((disk / "stages/train/checkpoints/step-00000002").exists):
            assert_survives_a_full_disk(disk, "File too large")
        return
    try:
        assert_survives_a_full_disk(disk, "No space left on device")
    finally:
        subprocess.run(["umount", disk], check=True)


CGROUPS = {
    "none": ({}, 8_000_000 << 10),
    "the second version, the limit of the group above": (
        {
            "proc/self/cgroup": "0::/slurm/job_7\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": "max\n",
            "sys/fs/cgroup/slurm/memory.max": "5000000000\n",
            "sys/fs/cgroup/slurm/memory.current": "4000000000\n",
            "sys/fs/cgroup/slurm/memory.stat": "anon 1\ninactive_file 600000000\nactive_file 7\n",
        },
        1_600_000_000,
    ),
    "the first version": (
        {
            "proc/self/cgroup": "5:devices:/x\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
        },
        2000,
    ),
    "no limit": (
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        },
        8_000_000 << 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_memory_that_is_free_is_what_the_host_has_and_the_cgroup_allows(tmp_path, name):
    files, expected = CGROUPS[name]
    assert space.memory(tmp_path) is None, "where the system does not say"
    meminfo = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
    for path, text in {"proc/meminfo": meminfo, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert space.memory(tmp_path) == expected


def test_memory_for_the_copy_of_a_checkpoint_is_looked_for_before_training(tmp_path, monkeypatch, capsys):
    assert space.memory() > 1 << 20, "this host says how much is free"
    train(tmp_path / "enough")
    assert "memory" not in capsys.readouterr().err
    monkeypatch.setattr("distill.core.space.memory", lambda: 1000)
    train(tmp_path / "short")
    assert re.search(
        r"warning: saving keeps a copy of the checkpoint, about \d+\.\d [kM]B, in the memory of this host, but "
        r"only 1.0 kB is free there",
        capsys.readouterr().err,
    )


def test_a_disk_that_fails_while_room_is_looked_for_is_one_message(tmp_path, monkeypatch):
    saver = make(tmp_path)
    good = save(saver, 1, 1, groups(1, size=1000))

    def stale(folder):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("distill.core.space.free", stale)
    said = f"cannot save checkpoint {tmp_path / 'step-00000002'}: Stale file handle; last good checkpoint: {good}"
    with pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        save(saver, 2, 2, groups(2, size=1000))


def test_room_is_looked_for_before_training_and_before_each_save(tmp_path, monkeypatch):
    left = 1000
    monkeypatch.setattr("distill.core.space.free", lambda folder: left)
    with pytest.raises(
        RunError, match=r"not enough disk space for 3 checkpoints: \d+\.\d [kM]B needed, but only 1.0 kB free in"
    ):
        train(tmp_path, checkpoint={"images": 16, "minutes": None, "keep": 2})
    assert not (tmp_path / "stages/train/checkpoints").exists()
    saver = make(tmp_path)
    good = save(saver, 1, 1, groups(1, size=1000))
    with pytest.raises(RunError) as caught:
        save(saver, 2, 2, groups(2, size=1000))
    step = tmp_path / "step-00000002"
    assert re.fullmatch(
        rf"cannot save checkpoint {step}: \S+ kB needed, but only 1.0 kB free in {tmp_path}; "
        rf"last good checkpoint: {good}", str(caught.value)
    )  # fmt: skip
    assert latest(tmp_path, refuse_warning).meta.step == 1
    left = 1 << 40
    save(saver, 2, 2, groups(2, size=1000))


def test_a_file_over_the_quota_is_one_message(tmp_path):
    """The limit on a file's size stands in for a quota where nothing may be mounted."""
    saver = make(tmp_path)
    good = save(saver, 1, 1, groups(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError) as caught:
            save(saver, 2, 2, groups(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    step = tmp_path / "step-00000002"
    assert str(caught.value) == f"cannot save checkpoint {step}: File too large; last good checkpoint: {good}"
    assert names(tmp_path) == ["step-00000001"]
    assert latest(tmp_path, refuse_warning).meta.step == 1


def test_a_store_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot save checkpoint .*Not a directory; last good checkpoint: none yet"):
        save(make(tmp_path / "file" / "checkpoints"), 1, 1, groups(1))


def test_reading_while_a_trainer_replaces(tmp_path):
    """Whatever is read between two saves is whole: weights() never fails and never goes back."""
    saver = make(tmp_path, keep=1)
    save(saver, 1, 1, groups(1))
    enough = threading.Event()

    def replace():
        step = 1
        while not enough.is_set():
            step += 1
            save(saver, step, step, groups(step))

    trainer = threading.Thread(target=replace)
    trainer.start()
    seen, until = [], time.monotonic() + 1
    try:
        while time.monotonic() < until:
            given, images = weights(tmp_path, warn=lambda text: None)
            assert images == int(given["n"])  # of the same checkpoint
            assert (given["w"] == float(given["n"])).all()
            seen.append(int(given["n"]))
    finally:
        enough.set()
        trainer.join()
    assert seen == sorted(seen) and len(set(seen)) > 3
