"""The cost of growing pair sets: work is counted (calls, bytes, files), not timed."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.flow import draws
from distill.flow.draws import Rows
from distill.pairs import PairSet, PairSource, generate
from distill.runs.progress import Progress
from distill.shards.manifest import file_sha256
from distill.spec import pairspec
from distill.spec.layout import Layout
from distill.spec.model import GaussianTeacher, PairsStage
from distill.spec.pairspec import size
from distill.teachers.analytic import gaussian_teacher

TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.7, -1.0], std=[0.5, 2.0]))
FEW, MANY = 20, 100  # shards
PAIRS = 4  # of a shard


def make(folder, shards, stop=None, part=None):
    stage = PairsStage(kind="pairs", count=shards * PAIRS, solver="euler", steps=1, block=PAIRS, shard=PAIRS)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(
            TEACHER,
            stage,
            folder,
            seed=5,
            device=torch.device("cpu"),
            progress=progress,
            stop=stop or StopRequest(),
            part=part,
        )
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A small and a large set, and what making each has taken: Python calls, bytes written."""
    folder, found = tmp_path_factory.mktemp("sets"), {}
    make(folder / "warm", 2)
    for shards in (FEW, MANY):
        before = written()
        taken = calls(lambda shards=shards: make(folder / str(shards), shards))
        found[shards] = (folder / str(shards), taken, written() - before)
    return found


def written() -> int:
    """Bytes that this process has passed to write() so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def watch(work: Callable[[], object], see: Callable[[object, str], None]) -> None:
    """`work`, with `see(frame, event)` at every call of a function, of Python or of C."""
    sys.setprofile(lambda frame, event, _: see(frame, event))
    try:
        work()
    finally:
        sys.setprofile(None)


def calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls."""
    found = 0

    def see(frame: object, event: str) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    watch(work, see)
    return found


def arguments(work: Callable[[], object], function: Callable[..., object], name: str) -> list[object]:
    """The argument `name` of every call of a Python function by `work`."""
    found, code = [], inspect.unwrap(function).__code__  # in tests, beartype wraps it

    def see(frame, event: str) -> None:
        if event == "call" and frame.f_code is code:
            found.append(frame.f_locals[name])

    watch(work, see)
    return found


# --- which file holds which pairs ---


@pytest.mark.parametrize(("count", "shard"), [(22, 8), (24, 8), (1, 8), (8, 8), (9, 8), (5, 1)])
def test_a_layout_covers_every_pair_once(count, shard):
    layout = Layout(count, shard)
    assert [i for number in range(layout.files) for i in layout.indices(number)] == list(range(count))
    assert [layout.number(layout.name(number)) for number in range(layout.files)] == list(range(layout.files))
    for parts in (1, 2, 3, 7):
        of_parts = [layout.part((i, parts)) for i in range(parts)]
        assert sorted(number for part in of_parts for number in part) == list(range(layout.files))
        for part in of_parts:
            assert layout.items(part) == sum(len(layout.indices(number)) for number in part)


@pytest.mark.parametrize(
    "name",
    ["shard-00003.safetensors", "shard-0002.safetensors", "shard-000002.safetensors", "shard-٠٠٠٠1.safetensors",
     "../shard-00001.safetensors", "shard-00001.json", "shard-00001.safetensors\n", "", "shard-99999999999999999999"],
)  # fmt: skip
def test_names_that_no_file_of_a_set_has(name):
    assert Layout(22, 8).number(name) is None


def test_a_huge_count_is_refused_without_work():
    stage = PairsStage(kind="pairs", count=100_000_000_000)
    assert calls(lambda: list(pairspec.mistakes(stage, ""))) < 100
    assert size(stage, (1, 3)) == 8_138_021 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"count": 10**9},
            "shard: 1,000,000,000 pairs in files of 4,096 are 244,141 files, more than 100,000; set shard to "
            "10240 or more, or give a smaller count",
        ),
    ],
)
def test_what_is_too_much_is_refused(change, message):
    assert message in list(pairspec.mistakes(PairsStage(kind="pairs", **{"count": 10, **change}), ""))
    assert not list(pairspec.mistakes(PairsStage(kind="pairs", count=10**9, shard=10240), ""))


# --- making, opening, reading ---


def test_making_a_set_takes_as_much_for_every_shard(sets):
    (_, few, few_bytes), (_, many, many_bytes) = sets[FEW], sets[MANY]
    assert many / few < 1.05 * MANY / FEW
    assert many_bytes / few_bytes < 1.05 * MANY / FEW


def test_opening_a_set_takes_as_much_for_every_shard(sets):
    few, many = (calls(lambda folder=sets[n][0]: PairSet.open(folder, None)) for n in (FEW, MANY))
    assert many / few < 1.05 * MANY / FEW


def test_a_batch_costs_the_same_whatever_the_number_of_shards(sets):
    sources = [PairSource(PairSet.open(sets[n][0], None), 16, 0) for n in (FEW, MANY)]
    for source in sources:
        source.batch(0, Rows(0, 16, 16))
    few, many = (calls(lambda source=source: source.batch(1, Rows(0, 16, 16))) for source in sources)
    assert many == few


def test_files_stay_few_however_many_a_batch_touches(sets):
    source = PairSource(PairSet.open(sets[MANY][0], None), MANY * PAIRS, 0)
    source.batch(0, Rows(0, MANY * PAIRS, MANY * PAIRS))  # every shard
    assert len(source.held) <= source.group
    assert not [path for path in Path("/proc/self/fd").iterdir() if source.pairs.folder in path.resolve().parents]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split()[-1] for line in maps if str(source.pairs.folder) in line}
    assert len(mapped) <= source.group


def test_noise_is_drawn_of_own_rows_alone(sets):
    source = PairSource(PairSet.open(sets[MANY][0], None), 64, 0)
    whole = source.batch(3, Rows(0, 64, 64)).pairs
    ours = []
    drawn = arguments(lambda: ours.append(source.batch(3, Rows(24, 32, 64)).pairs), draws.sample_noise, "indices")
    assert sum(map(len, drawn)) == 8
    assert torch.equal(ours[0].noise, whole.noise[24:32]) and torch.equal(ours[0].data, whole.data[24:32])


def test_ranks_share_the_checksums(sets):
    folder = sets[FEW][0]
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    read = [
        [path.name for path in arguments(lambda rank=rank: PairSet.open(folder, None, rank, 3), file_sha256, "path")]
        for rank in range(3)
    ]
    assert [len(each) for each in read] == [7, 7, 6] and sorted(sum(read, [])) == names


def test_a_damaged_shard_is_found_by_one_of_the_ranks(tmp_path):
    make(tmp_path, 4)
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged \(checksum mismatch\)"):
        PairSet.open(tmp_path, None, 1, 3)
    for rank in (0, 2):
        PairSet.open(tmp_path, None, rank, 3)


def test_a_message_names_a_few_of_many_files(tmp_path):
    make(tmp_path, 10)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"shard-00004\.safetensors is missing, and 5 more; delete damaged and unknown files"
    ):
        PairSet.open(tmp_path, None)


def test_an_interrupted_set_is_counted_by_its_records(tmp_path):
    make(tmp_path, 5, part=(0, 2))  # three of the five
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["manifest.json"] + [
        f"shard-{number:05}.json" for number in (0, 2, 4)
    ]
    with pytest.raises(InputError, match=r"is incomplete: 3 of 5 shards exist; run its pairs stage again to finish it"):
        PairSet.open(tmp_path, None)
    make(tmp_path, 5)
    assert [path.name for path in tmp_path.glob("*.json")] == ["manifest.json"], "the manifest lists them now"
