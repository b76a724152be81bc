"""A run's records of its cluster jobs: what was submitted, how each job ended, why it was queued again.

Each process that records events of a job (the submitting process, each attempt of the job) writes its own file in the
job's folder, `jobs/JOB/`. Earlier versions wrote one file per job, `jobs/JOB.jsonl`. This module does not call Slurm.
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
from distill.runs import cached, events
from distill.runs.run_store import RunPaths, append_line, event_line, read_events
from distill.spec.layout import Layout, listed, shard_path
from distill.spec.model import PairsStage, RunSpec

ASKED, LOST = "asked", "lost"  # ended by a signal of unknown reason; ended without recording anything
SHOWN = {ASKED: "stop signal", LOST: "no exit report"}  # how these reasons are shown to users
ATTEMPT = 2  # number of saves for which the lead time must suffice
SPARE = 60.0  # seconds of the lead time in addition to these saves
STEP = re.compile(r"step (\d{1,18})\b")
NUMBER = re.compile(r"([0-9]{1,18})(\.jsonl)?")  # name of a submission's folder; with .jsonl, its file in old versions
SUBMITTED = "submitted"  # an event; files with it have this prefix, so that they are found without reading the others
MOST = 1000  # only the newest submissions of a run are read, at most this many


@dataclass(frozen=True)
class Job:
    """One submission to the cluster: a job or a job array."""

    id: str
    stages: list[str]
    parts: list[int] | None
    """parts of a pairs stage, one for each job of the array; None: not an array"""
    script: str
    after: list[str]
    """jobs that must succeed before this one begins"""
    time: float
    """time of the submission, unix seconds"""

    @property
    def members(self) -> list[str]:
        """Ids of the individual jobs; those of an array are ID_PART."""
        return [self.id] if self.parts is None else [f"{self.id}_{part}" for part in self.parts]


def append(run: RunPaths, job: str, event: str, **fields: Any) -> None:  # noqa: ANN401
    """Append an event of a job to this process's own file."""
    name = f"{Owner.this().token}{events.SUFFIX}"
    path = run.jobs / job / (f"{SUBMITTED}-{name}" if event == SUBMITTED else name)
    append_line(path, event_line(event, **fields))


def history(run: RunPaths, job: str) -> list[dict[str, Any]]:
    """The events of a job, oldest first."""
    return list(events.read(_files(run, job), events.JOB))


def _files(run: RunPaths, job: str) -> list[Path]:
    return events.files(run.jobs / job, run.jobs / f"{job}{events.SUFFIX}")


def submitted(run: RunPaths) -> list[Job]:
    """The submissions of a run, oldest first. Only the newest `MOST` are read."""
    found = []
    numbers = {match[1] for match in map(NUMBER.fullmatch, records.names(run.jobs)) if match is not None}
    for number in sorted(numbers, key=lambda name: (len(name), name))[-MOST:]:
        files = [path for path in _files(run, number) if path.stem == number or path.name.startswith(SUBMITTED)]
        for line in islice(events.read(files, events.JOB, [SUBMITTED]), 1):
            fields = {field: line[field] for field in ("stages", "parts", "script", "after", "time")}
            found.append(Job(number, **fields))
    return sorted(found, key=lambda job: (job.time, len(job.id), job.id))


def ends(run: RunPaths, job: str) -> list[dict[str, Any]]:
    """The "ended" event of each attempt of a job, in order.

    If the next attempt found out why an attempt ended, its `why` is replaced by that.
    """
    return ends_of(history(run, job))


def ends_of(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Like `ends`, from the events of a job."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "ended":
            found[line["restart"]] = dict(line)
        elif line["event"] == "explained" and line["restart"] in found:
            found[line["restart"]]["why"] = line["why"]
    return list(found.values())


def shown(why: str) -> str:
    """A stored reason, as it is shown to users."""
    return SHOWN.get(why, why)


def restarts(run: RunPaths, members: Iterable[str]) -> dict[str, int]:
    """Reason -> how often these jobs were queued again."""
    return counted(line for member in members for line in ends(run, member))


def counted(ended: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Reason -> number of these ends after which the job was queued again."""
    return dict(Counter(str(line["why"]) for line in ended if line["again"]))


def position(run: RunPaths, stage: str, message: str) -> int | None:
    """The step at which a stage failed: the one in its message, else the last saved one, else None."""
    if (found := STEP.search(message)) is not None:
        return int(found[1])
    last = None
    for line in read_events(run, ["saved"]):
        last = line["step"] if line["stage"] == stage else last
    return last


def crashed_before(run: RunPaths, job: str, stage: str, step: int | None) -> bool:
    """Whether the last crash of this job was in the same stage at the same step."""
    crashes = [line for line in ends(run, job) if line["why"] == "crash"]
    return any(line.get("stage") == stage and line.get("step") == step for line in crashes[-1:])


def made_no_step(run: RunPaths, job: str, stage: str, step: int | None) -> bool:
    """Whether an attempt that reaches its time limit at this step of a stage is the third in a row without a new step.

    The attempt before these three ended at the same step; there need not be one if no step was saved yet.
    """
    count = 2 if step is None else 3
    last = ends(run, job)[-count:]
    same = [line["why"] == "time limit" and line.get("stage") == stage and line.get("step") == step for line in last]
    return len(same) == count and all(same)


def lead_needed(run: RunPaths) -> float:
    """Lead time in seconds needed for saving, from this run's slowest save; 0 if nothing was saved yet."""
    slowest = max((float(line.get("seconds", 0.0)) for line in read_events(run, ["saved"])), default=0.0)
    return 0.0 if slowest == 0 else ATTEMPT * slowest + SPARE


def parts_to_make(run: RunPaths, spec: RunSpec, name: str) -> list[int]:
    """The parts (jobs of an array of `launch.slurm.pairs_jobs` jobs) of a pairs or cache stage that are not made yet.

    How many shards a cache has is known only once its stage has begun; before that, all parts are listed.
    """
    stage, parts = spec.stages[name], spec.launch.slurm.pairs_jobs
    if isinstance(stage, PairsStage):
        return missing_parts(stage, run.stage(name).pairs, parts)
    caches = cached.noted(run, name)
    if caches is None:
        return list(range(parts))
    places = [(each.files, each.place(run.root.parent)) for each in caches]
    unfinished = [(files, place) for files, place in places if len(listed(place) or {}) < files]
    return sorted({part for files, place in unfinished for part in _missing(files, place, parts)})


def missing_parts(stage: PairsStage, folder: Path, parts: int) -> list[int]:
    """The parts (jobs of an array of `parts` jobs) that still have pairs to make."""
    return _missing(Layout.of(stage).files, folder, parts)


def _missing(files: int, folder: Path, parts: int) -> list[int]:
    """The parts that still have some of the shards of a set to make."""
    made = {path.stem for path in folder.glob("shard-*.json")}
    todo = (number for number in range(files) if shard_path(folder, number).stem not in made)
    return sorted({number % parts for number in todo})
