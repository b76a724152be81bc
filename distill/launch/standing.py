"""The state of a run on a cluster, from Slurm's data on its jobs and the run's own events."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distill.core.errors import InputError
from distill.launch import slurm
from distill.launch.slurm import JobState, NoAnswer
from distill.reports import run_status
from distill.reports.run_status import RunStatus
from distill.runs import cached, jobs
from distill.runs.run_store import RunPaths
from distill.spec import layout

ENDED = {"COMPLETED": "done", "CANCELLED": "cancelled"}  # any other final state is shown under Slurm's own name


@dataclass(frozen=True)
class StageJob:
    """The newest submission that computes a stage, or a part of one."""

    job: str
    stages: list[str]
    states: dict[str, JobState]
    """job -> state, for the jobs that Slurm still knows or that are recorded as done"""
    restarts: dict[str, int]
    """reason -> how often the jobs were queued again"""
    last: str
    """how the last attempt failed or was cancelled; "": neither"""

    @property
    def state(self) -> str:
        """The state as named by Slurm; with counts if the jobs of an array differ."""
        counts = Counter(each.state for each in self.states.values())
        if len(counts) <= 1:
            return next(iter(counts), "unknown")
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    @property
    def reason(self) -> str:
        """Why it is pending."""
        return next((s.reason for s in self.states.values() if s.state == "PENDING" and s.reason != "None"), "")


@dataclass(frozen=True)
class Standing:
    """A run and its jobs."""

    run: RunStatus
    jobs: list[StageJob] = field(default_factory=list)
    trouble: str = ""
    """why Slurm could not be queried"""

    @property
    def state(self) -> str:
        """queued, running, the state from the run's files, or the final state of a failed job as named by Slurm."""
        found = [state for job in self.jobs for state in job.states.values()]
        if self.run.state == "done" or not found:
            return self.run.state
        if any(state.is_live and state.state != "PENDING" for state in found):
            return "running"
        if any(state.state == "PENDING" for state in found):
            return "queued"
        bad = [state.state for state in found if state.state != "COMPLETED"]
        return ENDED.get(bad[0], bad[0]) if bad else self.run.state

    @property
    def message(self) -> str:
        """Why the run stopped; "" if it is queued, running or done."""
        if self.state in ("running", "queued", "done"):
            return ""
        return next((job.last for job in reversed(self.jobs) if job.last), self.run.message)


def read(runs: Sequence[RunPaths], *, brief: bool = False) -> list[Standing]:
    """The state of these runs, with as few queries to Slurm as possible. InputError if a run is damaged.

    brief: as in `run_status.read`. A damaged run then gets the state "damaged" instead of raising an error.
    """
    noted = [_noted(run, brief=brief) for run in runs]
    states: dict[str, JobState] = {}
    trouble = ""
    try:
        states = slurm.states([member for each in noted for member in each.open])
    except NoAnswer as error:
        trouble = str(error)
    return [
        Standing(each.run, [_job(job, each.ends, states) for job in each.jobs], trouble if each.jobs else "")
        for each in noted
    ]


@dataclass(frozen=True)
class _Noted:
    """The information from a run's files."""

    run: RunStatus
    jobs: list[jobs.Job]
    """the last submission of each script"""
    ends: dict[str, list[dict[str, Any]]]
    """job -> how each of its attempts ended"""

    @property
    def open(self) -> list[str]:
        """The jobs that are not recorded as done, whose states must be queried from Slurm."""
        return [member for member, lines in self.ends.items() if not _is_done(lines)]


def _noted(run: RunPaths, *, brief: bool) -> _Noted:
    try:
        newest = list({job.script: job for job in jobs.submitted(run)}.values())
        ends = {member: jobs.ends(run, member) for job in newest for member in job.members}
        return _Noted(run_status.read(run, brief=brief), newest, ends)
    except InputError as error:
        if not brief:
            raise
        return _Noted(run_status.damaged(run, error), [], {})


def _is_done(ends: Sequence[Mapping[str, Any]]) -> bool:
    return bool(ends) and ends[-1]["why"] == "done"


def _job(job: jobs.Job, noted: Mapping[str, list[dict[str, Any]]], states: Mapping[str, JobState]) -> StageJob:
    ends = {member: line for member in job.members for line in noted[member][-1:] if not line["again"]}
    cancelled = [member for member, line in ends.items() if line["why"] == "cancelled"]
    done = JobState("COMPLETED", exit_code="0:0")
    known = {member: done if _is_done(noted[member]) else states.get(member) for member in job.members}
    found = {member: state for member, state in known.items() if state is not None}
    for member in found.keys() & cancelled:  # it saved and exited with code 75, which Slurm calls a failure
        found[member] = replace(found[member], state="CANCELLED")
    bad = [
        line.get("message", "") if member in cancelled else f"{jobs.shown(line['why'])}: {line.get('message', '')}"
        for member, line in ends.items()
        if line["why"] != "done"
    ]
    restarts = jobs.counted(line for member in job.members for line in noted[member])
    return StageJob(job.id, job.stages, found, restarts, bad[-1] if bad else "")


def shards(run: RunPaths, stage: str) -> int:
    """Number of shards of a pairs or cache stage that are complete."""
    made = cached.noted(run, stage) if run.stage(stage).caches.exists() else None  # None: pairs
    if made is None:
        return layout.made(run.stage(stage).pairs)
    return sum(layout.made(each.place(run.root.parent)) for each in made)
