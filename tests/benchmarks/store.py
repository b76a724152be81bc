"""Looking at runs: what a list, a log and a report cost by how many runs there are, and how long they are."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from distill.runs.run_store import CREATED, RunPaths, event_line
from distill.spec import presets, specfile

COMMANDS = ("list", "status")
KILOBYTES = 80  # of events in a run of the store: more than the end that says how it stands


def _cost(*arguments: str, cwd: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of `distill ARGUMENTS`, by a process of its own that waits for it."""
    command = [sys.executable, "-m", "tests.benchmarks.store", cwd, *arguments]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, peak


def _progress(number: int, stage: str, total: int) -> str:
    logs = {"loss": 0.5 + 1 / number, "grad_norm": 1 / number, "lr": 1e-3}
    counts = {"unit": "images", "done": 128 * number, "total": 128 * total, "per_second": 1000.0}
    return event_line("progress", label=stage, **counts, logs=logs)


def _store(folder: Path, count: int) -> None:
    """A store of runs that are done."""
    spec = specfile.load(presets.find("digits")).spec
    text = specfile.resolved(spec)
    lines, number = [event_line("created", stages={name: stage.kind for name, stage in spec.stages.items()})], 0
    while sum(map(len, lines)) < 1024 * KILOBYTES:
        for name in spec.stages:
            lines += [_progress(number := number + 1, name, 10**6) for _ in range(20)]
            lines.append(event_line("saved", stage=name, step=number, images=number, seconds=0.1))
    lines.append(event_line("finished", message=""))
    for place in range(count):
        run = RunPaths(folder / f"run-{place:05}")
        run.events.mkdir(parents=True)
        run.spec.write_text(text)
        (run.root / CREATED).write_text("".join(lines))
        for name in spec.stages:
            run.stage(name).root.mkdir(parents=True)
            run.stage(name).done.write_text("{}")


def bench_runs(counts: tuple[int, ...] = (250, 500, 1000, 2000)) -> str:
    """CPU of list and status by the number of runs; their slope is what each run more costs."""
    taken: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            _store(Path(folder) / "runs", count)
            for command in COMMANDS:
                taken[command].append(min(_cost(command, cwd=folder)[0] for _ in range(3)))
    lines = [
        f"{command}: {', '.join(f'{count:,} runs {s:.2f} s' for count, s in zip(counts, seconds, strict=True))}; "
        f"{1000 * (seconds[-1] - seconds[0]) / (counts[-1] - counts[0]):.2f} ms a run (goal: 2,000 runs <= 1 s)"
        for command, seconds in taken.items()
    ]
    return "runs    " + "\n        ".join(lines)


def bench_looks(few: int = 100_000, many: int = 1_000_000) -> str:
    """CPU and peak memory of logs and report by the length of what they read."""
    lines = []
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            _store(Path(folder) / "runs", 1)
            run = RunPaths(Path(folder) / "runs" / "run-00000")
            with (run.root / CREATED).open("a") as file:
                file.writelines(_progress(number, "teach", count) for number in range(1, count + 1))
            run.logs.mkdir()
            with run.log(0).open("w") as file:
                file.writelines(f"2026-11-25 17:40:00  teach  {n:,} images  100 images/s\n" for n in range(count))
            for arguments in (["logs"], ["logs", "--lines", "0"], ["report"]):
                seconds, peak = _cost(arguments[0], run.name, *arguments[1:], cwd=folder)
                lines.append(f"{' '.join(arguments)} of {count:,} lines: {seconds:.2f} s, peak {peak:.0f} MB")
    return "looks   " + "\n        ".join([*lines, "(goal: the same peaks; logs in the same time)"])


def _measure(folder: str, arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "distill", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))


if __name__ == "__main__":
    _measure(sys.argv[1], sys.argv[2:])
