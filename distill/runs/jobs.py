"""A run's records of its jobs on a cluster: what was submitted, how each ended, why it was queued again.

Each process that notes something of a job (who submits it, each attempt of the job) writes a file of its own in the
job's folder, `jobs/JOB/`. Earlier versions kept one file for each job, `jobs/JOB.jsonl`. Nothing here asks Slurm.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill.core import records
from distill.core.owners import Owner
from distill.runs import events
from distill.runs.run_store import RunPaths, append_line, event_line, read_events
from distill.spec import pairspec
from distill.spec.model import PairsStage

ATTEMPT = 2  # how many saves the lead must have room for
SPARE = 60.0  # seconds of the lead beside them
STEP = re.compile(r"step (\d{1,18})\b")
NUMBER = re.compile(r"([0-9]{1,18})(\.jsonl)?")  # of a submission: the name of its folder, or file
SUBMITTED = "submitted"  # begins the name of a file of the event of that name, so that it is found without the others
MOST = 1000  # submissions of a run that are read, the newest


@dataclass(frozen=True)
class Job:
    """One submission: a job, or an array of them."""

    id: str
    stages: list[str]
    parts: list[int] | None
    """of a pairs stage, one a job of the array; null: not an array"""
    script: str
    after: list[str]
    """jobs that must end well before it begins"""
    time: float
    """of the submission, unix seconds"""

    @property
    def members(self) -> list[str]:
        """Names of the jobs themselves: those of an array are ID_PART."""
        return [self.id] if self.parts is None else [f"{self.id}_{part}" for part in self.parts]


def append(run: RunPaths, job: str, event: str, **fields: Any) -> None:  # noqa: ANN401
    """One event of a job, in this process's own file."""
    name = f"{Owner.this().token}{events.SUFFIX}"
    path = run.jobs / job / (f"{SUBMITTED}-{name}" if event == SUBMITTED else name)
    append_line(path, event_line(event, **fields))


def history(run: RunPaths, job: str) -> list[dict[str, Any]]:
    """What is known of a job, oldest first."""
    return list(events.read(_files(run, job), events.JOB))


def _files(run: RunPaths, job: str) -> list[Path]:
    return events.files(run.jobs / job, run.jobs / f"{job}{events.SUFFIX}")


def submitted(run: RunPaths) -> list[Job]:
    """Every submission of a run, oldest first; of very many the newest."""
    found = []
    numbers = {match[1] for match in map(NUMBER.fullmatch, records.names(run.jobs)) if match is not None}
    for number in sorted(numbers, key=lambda name: (len(name), name))[-MOST:]:
        files = [path for path in _files(run, number) if path.stem == number or path.name.startswith(SUBMITTED)]
        for line in islice(events.read(files, events.JOB, [SUBMITTED]), 1):
            fields = {field: line[field] for field in ("stages", "parts", "script", "after", "time")}
            found.append(Job(number, **fields))
    return sorted(found, key=lambda job: (job.time, len(job.id), job.id))


def ends(run: RunPaths, job: str) -> list[dict[str, Any]]:
    """How each attempt of a job ended, in order. What only the next attempt could tell of one is filled in."""
    return ends_of(history(run, job))


def ends_of(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, of what is known of the job."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "ended":
            found[line["restart"]] = dict(line)
        elif line["event"] == "explained" and line["restart"] in found:
            found[line["restart"]]["why"] = line["why"]
    return list(found.values())


def restarts(run: RunPaths, members: Iterable[str]) -> dict[str, int]:
    """How often these jobs were queued again, by reason."""
    return counted(line for member in members for line in ends(run, member))


def counted(ended: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of these ends were followed by another attempt, by reason."""
    return dict(Counter(str(line["why"]) for line in ended if line["again"]))


def position(run: RunPaths, stage: str, message: str) -> int | None:
    """The step a stage had come to when it failed: the one that its message names, else the last that was saved."""
    if (found := STEP.search(message)) is not None:
        return int(found[1])
    last = None
    for line in read_events(run, ["saved"]):
        last = line["step"] if line["stage"] == stage else last
    return last


def crashed_before(run: RunPaths, job: str, stage: str, step: int | None) -> bool:
    """Whether the last crash of this stage was at this very step."""
    crashes = [line for line in ends(run, job) if line["why"] == "crash"]
    return any(line.get("stage") == stage and line.get("step") == step for line in crashes[-1:])


def lead_needed(run: RunPaths) -> float:
    """Seconds of warning that saving takes, as this run's slowest save tells; 0: nothing was saved yet."""
    slowest = max((float(line.get("seconds", 0.0)) for line in read_events(run, ["saved"])), default=0.0)
    return 0.0 if slowest == 0 else ATTEMPT * slowest + SPARE


def missing_parts(stage: PairsStage, folder: Path, parts: int) -> list[int]:
    """Those of the jobs of an array that still have shards to make."""
    made = {path.name for path in folder.glob("shard-*.json")}
    todo = (
        n
        for n in range(pairspec.Layout.of(stage).files)
        if pairspec.shard_record(pairspec.shard_path(folder, n)).name not in made
    )
    return sorted({number % parts for number in todo})
