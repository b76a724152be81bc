"""What training on several processes costs: step time, memory and checkpoints of ZeRO 0-3 against the plain path."""

import json
import os
import socket
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import torch

from distill.core.stop import StopRequest
from distill.data import DataSource, load_data
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths, read_events
from distill.spec import registry
from distill.spec.model import CheckpointSpec, DigitsData, TrainStage, UNetSpec
from distill.students.init import StudentInit
from distill.training import engine
from distill.training.memory import KINDS, Probe
from distill.training.saving import Saver
from distill.training.world import World
from distill.training.zero import Zero
from tests.programs.forked import Forked

ZERO = ("plain", "0", "1", "2", "3")
SIZES = {"0.3 M": [32, 40], "20 M": [256, 320]}
BATCH, MICRO, STEPS, WARM = 32, 8, 8, 3


GROWN: list[int] = []  # bytes by which this process grew in each copy of its part of a checkpoint
COPIED: list[float] = []  # seconds of copying the same tensors into buffers that are kept, once for each save


class Weighing(Saver):
    """Notes by how much the process grows when a save copies the tensors, and what copying them alone takes.

    They are copied just before the save, since afterwards its thread uses the memory, too.
    """

    kept: ClassVar[list[torch.Tensor]] = []

    def save(self, step, images, groups):
        began = time.perf_counter()
        groups = list(groups)
        gathered = time.perf_counter() - began
        COPIED.append(self.copying(groups))
        super().save(step, images, groups)
        if self._writing is not None:
            self._writing.standstill += gathered

    def copying(self, groups):
        tensors = [tensor for _, parts in groups for tensor in parts.tensors.values()]
        if len(self.kept) != len(tensors):
            self.kept[:] = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
            self.copying(groups)  # the memory is made
        began = time.perf_counter()
        for ours, theirs in zip(self.kept, tensors, strict=True):
            ours.copy_(theirs)
        return time.perf_counter() - began

    def _copy(self, groups):
        before = _resident()
        files = super()._copy(groups)
        GROWN.append(_resident() - before)
        return files


def _resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Clocked(DataSource):
    """Notes when a step begins."""

    def batch(self, step, rows):
        if not self.times or self.times[-1][0] != step:
            self.times.append((step, time.perf_counter()))
        return super().batch(step, rows)


def rank(out, rounds, save, *cases):
    """One rank: trains case after case, and writes what each took."""
    procs, me = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // procs))
    engine.Saver = Weighing
    world = World.join(torch.device("cpu"), 10, me, print) if procs > 1 or cases != ("plain",) else World()
    module = registry.load("pretrain/flow_matching", Path())
    found = {}
    for number in range(rounds):
        for case in cases:
            size, stage = case.split("/")
            run = RunPaths(Path(out) / f"run-{number}" / case.replace("/", "-"))
            run.root.mkdir(parents=True, exist_ok=True)
            spec = TrainStage(
                kind="train", recipe="pretrain/flow_matching", images=(2 if save else 1) * STEPS * BATCH,
                batch_size=BATCH, ema_half_lives=[1000.0],
                checkpoint=CheckpointSpec(images=4 * BATCH if save else None),
            )  # fmt: skip
            source = Clocked(load_data(DigitsData(kind="digits"), 0), BATCH, 0)
            source.times = []
            init = StudentInit(None, UNetSpec(kind="unet", channels=SIZES[size]), (1, 8, 8), 10, 0)
            sharding = Zero(None if stage == "plain" else int(stage))
            probe = Probe(sharding, procs)
            measured = probe if number == rounds - 1 and not save else None
            counting = probe.activations if measured else nullcontext()
            with Progress("bench", spec.images, "images", None) as progress, StopRequest() as stop, counting:
                result = engine.train(
                    module.Recipe(module.Config(), None), init, source, spec, seed=0, device=torch.device("cpu"),
                    micro_batch=MICRO, paths=run.stage("train"), progress=progress, stop=stop, world=world,
                    run=run if me == 0 else None, sharding=sharding, probe=measured,
                )  # fmt: skip
            groups = list(result.roles.groups()) if save else []
            own = sum(t.nbytes for _, parts in groups for t in parts.tensors.values())
            result.roles.close()
            begun = [at for _, at in source.times][WARM:]
            seconds = [b - a for a, b in zip(begun, begun[1:], strict=False)]
            saves = [event for event in read_events(run) if event["event"] == "saved"] if me == 0 else []
            entry = found.setdefault(case, {"seconds": [], "saves": [], "memory": {}, "own": own})
            entry["grown"] = GROWN[0] if GROWN else 0
            entry["copying"] = COPIED[1:]
            GROWN.clear()
            COPIED.clear()
            Weighing.kept.clear()
            entry["seconds"] += seconds if number < rounds - 1 or save else []
            entry["saves"] += saves
            entry["memory"] = probe.report(me)
    Path(out, f"rank-{me}.json").write_text(json.dumps(found))
    return 0


def measure(procs, cases, rounds=3, save=False, keep=None):
    """What each rank wrote. The last round counts memory, the others time."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        out = Path(keep or folder)
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(procs)}
        free.close()
        ranks = [
            Forked(rank, str(out), rounds, save, *cases, log=out / f"rank-{number}.log",
                   env={**shared, "RANK": str(number), "LOCAL_RANK": str(number), "DS_ACCELERATOR": "cpu"})
            for number in range(procs)
        ]  # fmt: skip
        codes = [each.end(3600) for each in ranks]
        assert codes == [0] * procs, ranks[0].said[-2000:]
        return [json.loads((out / f"rank-{number}.json").read_text()) for number in range(procs)]


def bench_zero() -> str:
    """Step time and memory at two sizes, on one process (two threads) and two (one thread each), equal batch."""
    lines, memory = [], []
    for size in SIZES:
        base = None
        for procs in (1, 2):
            found = measure(procs, [f"{size}/{zero}" for zero in ZERO])
            medians = [statistics.median(found[0][f"{size}/{zero}"]["seconds"]) for zero in ZERO]
            base = base or medians[0]
            cells = "  ".join(f"{zero} {median / base:.2f}" for zero, median in zip(ZERO, medians, strict=True))
            lines.append(
                f"    {size}, {procs} process{'es' if procs > 1 else ''}: {cells}  (plain {1000 * base:.0f} ms)"
            )
            for zero in ZERO:
                for number, each in enumerate(found):
                    memory.append(_memory(f"{size}, {procs} procs, zero {zero}, rank {number}", each, f"{size}/{zero}"))
    return "zero    step time against the plain path of one process\n" + "\n".join([*lines, *memory])


def _memory(label, found, case):
    report = found[case]["memory"]
    said, seen = (sum(report[which][kind] for kind in KINDS) / 1e6 for which in ("predicted", "counted"))
    rest = ", ".join(f"{name} {report[name] / 1e6:.0f} MB" for name in ("activations", "process"))
    return f"    memory {label}: predicted {said:.2f} MB, counted {seen:.2f} MB ({said / seen - 1:+.1%}); {rest}"


def bench_checkpoint(cases=((1, "plain"), (2, "2"), (2, "3"))) -> str:
    """How long saving a network of 20 M parameters keeps training waiting, against copying the same tensors into memory
    that is there, and until it is on the disk, against writing the same bytes. The least of three saves.
    """
    lines = []
    for procs, zero in cases:
        with tempfile.TemporaryDirectory() as folder:
            case = f"20 M/{zero}"
            found = measure(procs, [case], rounds=1, save=True, keep=folder)[0][case]
            last = sorted(Path(folder).glob("run-*/*/stages/train/checkpoints/step-*"))[-1]
            files = [path.read_bytes() for path in sorted(last.iterdir())]
            taken = []
            for round_ in range(3):
                began = time.perf_counter()
                for number, content in enumerate(files):
                    with Path(folder, f"plain-{round_}-{number}").open("wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                taken.append(time.perf_counter() - began)
        size, plain, copied = sum(map(len, files)), statistics.median(taken), min(found["copying"])
        first, *later = found["saves"]
        still, saved = (min(save[name] for save in later) for name in ("standstill", "seconds"))
        weights = (
            ""
            if procs == 1
            else f"; memory of rank 0: {found['grown'] / found['own']:.2f} of its own parts (goal <= 1.3)"
        )
        lines.append(
            f"    {procs} procs, zero {zero}: {size / 1e6:.0f} MB, training stands still for {still:.3f} s "
            f"(at the first save, which makes the memory, {first['standstill']:.3f} s); copying alone {copied:.3f} s: "
            f"ratio {still / copied:.2f} (goal <= 1.2); on the disk after {saved:.2f} s, plain writes and fsync "
            f"{plain:.2f} s{weights}"
        )
    return "checkpoint\n" + "\n".join(lines)
