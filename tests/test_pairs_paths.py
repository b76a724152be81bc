"""All kinds of paths, stored and read: known ends for Gaussian data, and the accuracy of the numbers."""

import dataclasses
import json
import math

import pytest
import torch

from distill.core import atomic
from distill.core.errors import InputError, Stopped
from distill.core.stop import StopRequest
from distill.data import DataSource, arrays
from distill.data.source import Items
from distill.flow import draws, solvers
from distill.flow.draws import Rows
from distill.flow.fields import Counted
from distill.flow.interpolants import linear
from distill.flow.times import uniform_grid
from distill.pairs import Beside, Mixed, PairSet, PairSource, accuracy, finish, generate, plan
from distill.pairs.numbers import Rounding, Whiteness
from distill.pairs.paths import of_data
from distill.runs.progress import Progress
from distill.shards.values import restored, stored
from distill.spec.apportion import rows_by_share
from distill.spec.model import GaussianTeacher, PairsStage, is_path
from distill.teachers.analytic import GaussianField, gaussian_teacher
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.7, -1.0]), torch.tensor([0.5, 2.0])
TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=MEAN.tolist(), std=STD.tolist()))
SMALL = {"count": 22, "solver": "heun", "steps": 8, "block": 4, "shard": 8}  # shards of 8, 8 and 6
TIMES = [1.0, 0.5, 0.25, 0.0]


def make(folder, teacher=TEACHER, *, seed=11, law=None, data=None, part=None, stop=None, **options):
    stage = PairsStage(kind="pairs", **{**SMALL, **options})
    real, digest = (None, None)
    if stage.paths in ("forward", "segments"):
        real, digest = of_data(data, law or teacher, seed=seed, block=stage.block)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(
            teacher, stage, folder,
            seed=seed, device=CPU, progress=progress, stop=stop or StopRequest(), part=part, real=real,
            data_digest=digest,
        )  # fmt: skip
        finish(folder, progress)
    return folder


def everything(folder, batch_size=22):
    """All pairs of a set, as one batch."""
    pairs = PairSet.open(folder, None)
    return PairSource(pairs, batch_size, 0).batch(0, Rows(0, batch_size, batch_size)).pairs


def flow_map(x, t, s):
    """The exact map of the Gaussian teacher from t to s, floats or [n, 1]."""
    (root_t, root_s) = (torch.sqrt((1 - u) ** 2 * STD**2 + u**2) for u in map(torch.as_tensor, (t, s)))
    return (1 - s) * MEAN + root_s / root_t * (x - (1 - t) * MEAN)


# --- forward ---


def test_forward_pairs_are_real_data_and_the_noise_that_leads_to_it(tmp_path):
    pairs = everything(make(tmp_path, paths="forward", steps=128))
    truth = TEACHER.exact_data(11, range(22))
    assert sorted(pairs.data[:, 0].tolist()) == sorted(truth[:, 0].tolist())
    assert (pairs.noise - (pairs.data - MEAN) / STD).abs().max() < 1e-3
    again = solvers.solve(TEACHER.field, pairs.noise, {}, solver="heun", steps=128)
    assert (again - pairs.data).abs().max() < 1e-3


def short(field):
    """The field in t in [0.03, 0.94] only, as VP teachers are."""
    return type("Short", (), {"interpolant": linear(), "t_range": (0.03, 0.94), "__call__": staticmethod(field)})()


SCALE = math.sqrt(0.06**2 + 0.94**2)  # of noise where such a field starts


def test_inverted_noise_is_what_sampling_starts_from_where_a_field_ends_early():
    """From noised data at its lowest time to its own start."""
    field = short(GaussianField(MEAN.double(), STD.double()))
    data, noise = TEACHER.exact_data(0, range(50)).double(), draws.sample_noise(5, range(50), (2,)).double()
    inverted = solvers.invert(field, data, {}, solver="heun", steps=400, noise=noise)
    begin = (1 - 0.03) * data + 0.03 * noise
    assert (inverted * SCALE - flow_map(begin, 0.03, 0.94)).abs().max() < 1e-4


def test_inversion_takes_one_call_more_than_sampling_by_heun(tmp_path):
    for solver, calls in (("heun", 16), ("euler", 8)):
        counted = Counted(TEACHER.field)
        make(tmp_path / solver, dataclasses.replace(TEACHER, field=counted), paths="forward", solver=solver, count=8)
        assert counted.calls / 2 == calls == PairSet.open(tmp_path / solver, None).manifest.nfe


def test_real_data_comes_with_its_own_classes(tmp_path):
    digits = arrays.digits()
    teacher = class_gaussian_teacher(torch.zeros(10, 2), torch.zeros(2), torch.ones(2))

    class Corner:
        name, shape, buckets, num_classes, prompts = "corner", (2,), None, 10, None
        digest, encoded = digits.digest, False

        def __len__(self):
            return len(digits)

        def items(self, epoch, indices):
            images, labels, _ = digits.items(epoch, indices)
            return Items(images[:, 0, 3, 3:5], labels)

    folder = make(tmp_path, teacher, data=Corner(), paths="forward", count=60, block=20, shard=20)
    found = [PairSet.open(folder, None).load(n) for n in range(3)]
    images, labels = (torch.cat([getattr(each, name) for each in found]) for name in ("data", "labels"))
    order = draws.permutation(len(digits), 11, 0)[:60].tolist()
    truth = digits.items(0, order)
    assert torch.equal(images, truth[0][:, 0, 3, 3:5]) and torch.equal(labels, truth[1])


# --- states ---


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_pp_2m", "unipc2"])
def test_a_trajectory_is_the_path_of_its_pair(tmp_path, solver):
    pairs = everything(make(tmp_path / "states", paths="trajectories", times=TIMES, solver=solver))
    ends = everything(make(tmp_path / "ends", solver=solver))
    assert torch.equal(pairs.noise, ends.noise) and torch.equal(pairs.data, ends.data)  # the same steps, to the bit
    assert torch.equal(pairs.states[:, 0], pairs.noise) and torch.equal(pairs.states[:, -1], pairs.data)
    assert torch.equal(pairs.times, torch.tensor(TIMES).expand(22, 4))
    path = list(solvers.states(solver, TEACHER.field, pairs.noise, uniform_grid(8), {}))
    assert (pairs.states[:, 1] - path[3]).abs().max() < 1e-6


def test_states_of_a_fine_solver_are_the_flow_map(tmp_path):
    pairs = everything(make(tmp_path, paths="trajectories", times=TIMES, steps=256))
    for k, t in enumerate(TIMES):
        assert (pairs.states[:, k] - flow_map(pairs.noise, 1.0, t)).abs().max() < 1e-4


def test_segments_go_from_noised_data_to_their_end(tmp_path):
    folder = make(tmp_path, paths="segments", times=TIMES, steps=256)
    pairs = everything(folder)
    t, s = pairs.times[:, :1], pairs.times[:, 1:]
    assert sorted(pairs.times.tolist()) == sorted([TIMES[i % 3 : i % 3 + 2] for i in range(22)])
    assert (pairs.states[:, 0] - ((1 - t) * pairs.data + t * pairs.noise)).abs().max() < 1e-6
    assert (pairs.states[:, 1] - flow_map(pairs.states[:, 0], t, s)).abs().max() < 1e-4
    assert PairSet.open(folder, None).manifest.nfe == (2 * 256 - 1) / 3


@pytest.mark.parametrize("paths", ["segments", "trajectories"])
def test_states_begin_with_the_noise_where_a_field_ends_early(tmp_path, paths):
    """So a student that takes their times as its own begins at t = 1, as all do."""
    teacher = dataclasses.replace(TEACHER, field=short(TEACHER.field))
    folder = make(tmp_path, teacher, paths=paths, times=TIMES, steps=256)
    times, pairs = PairSet.open(folder, None).manifest.times, everything(folder)
    assert is_path(times) and times[1] == pytest.approx(0.03 + 0.91 * 0.5, abs=0.01)
    first = pairs.times[:, 0] == 1
    assert torch.equal(pairs.states[first, 0], pairs.noise[first])
    assert (pairs.states[first, 1] - flow_map(pairs.noise[first] * SCALE, 0.94, times[1])).abs().max() < 1e-3


# --- numbers ---


def test_rounding_to_uint8_costs_what_uniform_rounding_costs(tmp_path):
    values = torch.rand(200_000, generator=draws.generator("uint8")) * 2 - 1
    rounding = Rounding.of(values, "uint8")
    assert math.isclose(rounding.error**0.5, 1 / math.sqrt(12) / 127.5, rel_tol=0.01)
    assert (restored(stored(values, "uint8")) - values).abs().max() <= 0.5 / 127.5 + 1e-6
    assert stored(torch.tensor([-1.0, 1.0, -3.0, 3.0]), "uint8").tolist() == [0, 255, 0, 255]


def test_a_set_knows_what_its_rounding_costs_and_says_so_where_it_is_much(tmp_path, capsys):
    make(tmp_path / "full")
    make(tmp_path / "wide", dtype="uint8")  # far outside of [-1, 1]
    manifest = PairSet.open(tmp_path / "wide", None).manifest
    full, wide = (
        torch.cat([PairSet.open(tmp_path / n, None).load(k).data for k in range(3)]) for n in ("full", "wide")
    )
    error = (restored(wide) - full).square().mean() / full.square().mean()
    assert math.isclose(manifest.rounding.relative, error.sqrt().item(), rel_tol=1e-5)
    said = (
        f"storing the data as uint8 changed it by {manifest.rounding.relative:.2%} (RMS); uint8 is only for pixels in"
    )
    assert said in capsys.readouterr().err
    narrow = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.1], std=[0.2]))
    make(tmp_path / "narrow", narrow, dtype="uint8", count=64)
    assert 0 < PairSet.open(tmp_path / "narrow", None).manifest.rounding.relative < 0.02
    assert PairSet.open(tmp_path / "full", None).manifest.rounding.error == 0


def test_paths_of_rounded_data_begin_at_what_is_read(tmp_path):
    narrow = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.1], std=[0.3]))
    pairs = everything(make(tmp_path, narrow, paths="forward", dtype="uint8", steps=256))
    assert (pairs.noise - (pairs.data - 0.1) / 0.3).abs().max() < 1e-3  # not off by a rounding of 1/255 / 0.3


def test_a_part_with_all_shards_leaves_what_others_are_writing(tmp_path):
    """Part 0 of two has the only shard; the process with the other part writes the same manifest at the same time."""
    (tmp_path / "p").mkdir()
    theirs = atomic.hidden(tmp_path / "p" / "manifest.json")
    theirs.write_text("half")
    make(tmp_path / "p", part=(0, 2), count=4, shard=4)
    assert theirs.exists()


def test_stored_noise_is_the_noise_and_needs_no_drawing(tmp_path, monkeypatch):
    make(tmp_path / "stored", store_noise=True)
    make(tmp_path / "drawn")
    assert torch.equal(everything(tmp_path / "stored").noise, everything(tmp_path / "drawn").noise)
    path = tmp_path / "stored" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_sha256": "0" * 64}))
    PairSet.open(tmp_path / "stored", None)  # whatever this machine would draw
    path = tmp_path / "drawn" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_sha256": "0" * 64}))
    with pytest.raises(InputError, match="or with their noise"):
        PairSet.open(tmp_path / "drawn", None)


def test_whiteness_of_noise_and_of_what_is_not():
    noise = draws.sample_noise(0, range(4000), (1, 8, 8))
    assert Whiteness.of(noise).faults(noise.numel()) == []
    smooth = (noise + noise.roll(1, -1)) / math.sqrt(2)
    found = Whiteness.of(smooth)
    assert abs(found.correlation - 0.25) < 0.01  # 1/2 along rows but for their first pair, 0 along columns: 7/16, 0
    assert [fault.split(" 0.")[0] for fault in found.faults(smooth.numel())] == ["correlation of neighbours"]
    assert Whiteness.of(2 * noise + 1).faults(noise.numel())[0].startswith("mean ")


def test_inverted_noise_that_is_none_is_said(tmp_path, capsys):
    wide = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=MEAN.tolist(), std=(2 * STD).tolist()))
    folder = make(tmp_path, wide, law=TEACHER, paths="forward", steps=64, count=2000, block=200, shard=1000)
    whiteness = PairSet.open(folder, None).manifest.whiteness
    assert abs(whiteness.variance - 0.25) < 0.02
    assert "the inverted noise is not standard normal: variance 0.2" in capsys.readouterr().err
    assert PairSet.open(make(tmp_path / "b"), None).manifest.whiteness is None


# --- accuracy of the solver ---


def measured(solver, steps):
    stage = PairsStage(kind="pairs", count=1000, solver=solver, steps=steps, block=250, shard=1000)
    return accuracy.measure(TEACHER.field, plan(TEACHER, stage, 0, None), None, CPU, StopRequest())


def test_the_steps_that_are_enough_are_found():
    found = measured("euler", 8)
    assert found.enough > 8 and found.differences[found.enough] <= 0.01 < found.differences[found.enough // 2]
    assert 1.7 < found.differences[8] / found.differences[16] < 2.3  # Euler's order
    assert f"more than the tolerated 1%; {found.enough} steps are enough" in found.describe()
    exact = TEACHER.field  # at what is enough, the ends are within about the tolerance of the truth
    noise = draws.sample_noise(0, range(1000), (2,))
    ends = solvers.solve(exact, noise, {}, solver="euler", steps=found.enough)
    assert (ends - (MEAN + STD * noise)).square().mean().sqrt() < 0.025 * ends.square().mean().sqrt()
    enough = measured("heun", 64)
    assert enough.enough == 64 and enough.describe().endswith("64 steps are enough")


def test_a_big_set_is_measured_once_and_advised(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "BIG", 20)
    field = Counted(TEACHER.field)
    make(tmp_path, dataclasses.replace(TEACHER, field=field), solver="euler")
    assert field.calls == 6 * (8 + 16) + 6 * 8, "six blocks, at N and 2 N steps, whatever they say; then the set"
    said = capsys.readouterr().err
    assert "with 8 steps, the endpoints of 22 pairs differ by" in said
    advice = "to find how many steps are enough, use `distill pairs` with --check"
    assert f"(RMS) from those with 16 steps, more than the tolerated 1%; {advice}" in said
    for name in ("shard-00001.safetensors", "shard-00000.safetensors"):
        (tmp_path / name).unlink()
        before = field.calls
        make(tmp_path, dataclasses.replace(TEACHER, field=field), solver="euler")
        assert field.calls == before + 2 * 8


def test_the_first_of_several_parts_measures_whatever_the_others_have_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "BIG", 20)
    make(tmp_path, part=(1, 2), solver="euler")
    assert not (tmp_path / "accuracy.json").exists()
    make(tmp_path, part=(0, 2), solver="euler")
    assert "with 8 steps, the endpoints of 22 pairs differ by" in capsys.readouterr().err


def test_measuring_stops_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "BIG", 20)
    stop, calls = StopRequest(), []

    def asked(x_t, t, cond):
        calls.append(t)
        stop.signal = "SIGUSR1"
        return TEACHER.field(x_t, t, cond)

    teacher = dataclasses.replace(TEACHER, field=exact.Network(asked))
    with pytest.raises(
        Stopped, match="stopped by SIGUSR1; saved: nothing, since the accuracy of the solver was being measured"
    ):
        make(tmp_path, teacher, stop=stop)
    assert len(calls) == 15, "the first block of Heun's eight steps"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


# --- parts ---


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"paths": "segments", "times": TIMES}, {"paths": "forward"}])
def test_parts_in_any_order_make_the_same_files(tmp_path, parts, options):
    whole = make(tmp_path / "whole", **options)
    for number in reversed(range(parts)):
        make(tmp_path / "parts", part=(number, parts), **options)
        assert json.loads((tmp_path / "parts" / "manifest.json").read_text())["done"] == (number == 0)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert files == {name: (tmp_path / "parts" / name).read_bytes() for name in files}


# --- several sets ---


def test_parts_of_a_batch_are_the_nearest_whole_rows():
    assert rows_by_share(10, [0.75, 0.25]) == [8, 2] and rows_by_share(128, [0.8, 0.2]) == [102, 26]
    assert rows_by_share(7, [1.0]) == [7] and sum(rows_by_share(11, [1 / 3] * 3)) == 11
    with pytest.raises(InputError, match="the fraction 0.05 of batch_size=4 is less than one pair per batch; increase"):
        rows_by_share(4, [0.95, 0.05])


def test_a_mixture_holds_its_parts_whoever_reads_it(tmp_path):
    a, b = PairSet.open(make(tmp_path / "a"), None), PairSet.open(make(tmp_path / "b", seed=12), None)

    def source():
        return Mixed([PairSource(a, 6, 0), PairSource(b, 2, 0)], [6, 2])

    for step in range(5):
        whole = source().batch(step, Rows(0, 8, 8)).pairs
        parts = [source().batch(step, Rows(i, i + 2, 8)).pairs for i in range(0, 8, 2)]
        assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
        alone = [PairSource(each, n, 0).batch(step, Rows(0, n, n)).pairs for each, n in ((a, 6), (b, 2))]
        is_b = (whole.data[:, None] == alone[1].data[None]).all(2).any(1)
        assert torch.equal(whole.data[~is_b], alone[0].data) and torch.equal(whole.data[is_b], alone[1].data)
        assert is_b[:4].sum() == is_b[4:].sum() == 1  # spread evenly


def test_real_data_beside_pairs_keeps_its_own_classes(tmp_path):
    pairs, data = PairSource(PairSet.open(make(tmp_path), None), 8, 0), DataSource(arrays.digits(), 8, 0)
    both, rows = Beside(pairs, data), Rows(2, 6, 8)
    assert torch.equal(both.batch(3, rows).pairs.data, pairs.batch(3, rows).pairs.data)
    assert torch.equal(both.batch(3, rows).data, data.batch(3, rows).data)
    assert torch.equal(both.batch(3, rows).data_cond["class_labels"], data.batch(3, rows).cond["class_labels"])
    assert both.batch(3, rows).cond == {}
