"""Wrappers of Slurm's commands, each with a time limit. This module does not depend on runs.

Job states come from the accounting database (sacct) if there is one, else from the controller, which forgets a job some
minutes after its end, else from the job completion log, if the site has one that can be read.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core.errors import InputError, RunError

PATIENCE = 4.5  # time limit of a query in seconds: without a controller, commands would wait for minutes
LONG = 60.0  # time limit of a command that changes something, which may take longer on a busy controller
LOG_BYTES = 4 * 1024 * 1024  # bytes that are read from the end of the job completion log
FEW = 5  # up to this many jobs are queried one by one; for more, a single query of all jobs is made
UNDIVIDED = "4294967294"  # Slurm's ArrayTaskId (NO_VAL) of a record of a whole array
LIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "STOPPED", "REQUEUED", "SIGNALING"})


class NoAnswer(RunError):  # noqa: N818  (named like the exceptions of `errors`)
    """Slurm is not available, does not answer in time, or a query fails."""


@dataclass(frozen=True)
class JobState:
    """The state of a job."""

    state: str
    """Slurm's name: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, PREEMPTED, NODE_FAIL, OUT_OF_MEMORY, CANCELLED"""
    reason: str = ""
    """why it is pending"""
    exit_code: str = ""
    """CODE:SIGNAL"""
    nodes: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the job is queued or running."""
        return self.state in LIVE


def require() -> None:
    """Raise InputError if Slurm's commands are not installed."""
    if shutil.which("sbatch") is None:
        raise InputError("there is no Slurm here (no command sbatch); use a login node, or --dry-run to see the script")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a job script, and return the job id. InputError if Slurm refuses it."""
    done = _call("sbatch", "--parsable", *options, str(script), patience=LONG)
    if done.returncode:
        raise InputError(f"Slurm refuses {script.name}: {_said(done)}")
    return done.stdout.strip().split(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs immediately. Jobs that have ended are ignored."""
    if jobs:
        _call("scancel", "--quiet", *jobs, patience=LONG)


def ask(job: str) -> bool:
    """Send USR1 to the script of a running job, which then saves and exits. Returns whether the signal was sent."""
    return _call("scancel", "--batch", "--signal=USR1", job).returncode == 0


def requeue(job: str) -> str:
    """Requeue a job; returns "" on success, else the reason for the failure."""
    try:
        done = _call("scontrol", "requeue", job, patience=LONG)
    except NoAnswer as error:
        return str(error)
    return _said(done) if done.returncode else ""


def partitions() -> list[str]:
    """The names of all partitions."""
    return sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))


def show(job: str) -> dict[str, str]:
    """The controller's record of a job: Slurm's field name -> value; {} if the controller has forgotten the job."""
    return next(iter(_records(job)), {})


def address(nodes: str) -> str:
    """The address of the first node of a node list, since its name may not resolve on other nodes."""
    head = _ask("scontrol", "show", "hostnames", nodes).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", head))
    return found[1] if found else head


def queued(comment: str) -> dict[str, str]:
    """Job id -> name of this user's queued and running jobs that have this comment."""
    lines = _ask("squeue", "--me", "--noheader", "--format=%F|%j|%k").splitlines()
    found = (line.split("|", 2) for line in lines)
    return {job: name for job, name, theirs in found if theirs == comment}


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """Job -> state, for jobs ID or ARRAY_PART. Unknown jobs are left out. NoAnswer if Slurm is not available."""
    if not jobs:
        return {}
    found = _from_accounting(jobs)
    missing = [job for job in jobs if job not in found or found[job].state == "PENDING"]  # to get the pending reason
    roots = list(dict.fromkeys(_root(job) for job in missing))
    for each in [[root] for root in roots] if len(roots) <= FEW else [[]]:
        found |= _by_job(_records(*each), missing)
    return {**_from_log([job for job in jobs if job not in found]), **found}


def previous_state(job: str) -> str:
    """The final state of the previous attempt of a requeued job; "" if unknown."""
    if shutil.which("sacct") is not None:
        done = _call("sacct", "-X", "--duplicates", "--noheader", "--parsable2", "--format=State", f"--jobs={job}")
        ended = [state for state in done.stdout.split() if state not in LIVE]
        if done.returncode == 0 and ended:
            return ended[-1]
    found = _from_log([job]).get(job)
    return "" if found is None else found.state


def _from_accounting(jobs: Sequence[str]) -> dict[str, JobState]:
    if shutil.which("sacct") is None:
        return {}
    names = ("JobID", "State", "Reason", "ExitCode", "NodeList")
    roots = ",".join(sorted({_root(job) for job in jobs}))
    try:
        done = _call("sacct", "-X", "--noheader", "--parsable2", f"--format={','.join(names)}", f"--jobs={roots}")
    except NoAnswer:  # the database may be unavailable while the controller is available
        return {}
    if done.returncode:  # this cluster has no accounting
        return {}
    rows, wanted = (line.split("|") for line in done.stdout.splitlines()), set(jobs)
    return {row[0]: JobState(row[1].split()[0], *row[2:5]) for row in rows if row[0] in wanted}


def _from_log(jobs: Sequence[str]) -> dict[str, JobState]:
    """Job -> state, from the job completion log. The last line of a job counts."""
    if not jobs:
        return {}
    config = _ask("scontrol", "show", "config")
    kind, place = (re.search(rf"^{name}\s*= (\S+)", config, re.MULTILINE) for name in ("JobCompType", "JobCompLoc"))
    if kind is None or kind[1] != "jobcomp/filetxt" or place is None:
        return {}
    try:
        with Path(place[1]).open("rb") as file:
            file.seek(max(0, Path(place[1]).stat().st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    return _by_job([_fields(line) for line in lines], jobs)


def _records(*job: str) -> list[dict[str, str]]:
    """The controller's records of a job, or of all jobs if none is given; empty if the job is unknown.

    An array may have several records.
    """
    done = _call("scontrol", "show", "job", "--oneliner", *job)
    if done.returncode:
        if "Invalid job id" in done.stderr or "not found" in done.stderr:
            return []
        raise NoAnswer(f"{' '.join(['scontrol show job', *job])}: {_said(done)}")
    return [_fields(line) for line in done.stdout.splitlines() if line.strip()]


def _by_job(records: Sequence[dict[str, str]], jobs: Sequence[str]) -> dict[str, JobState]:
    """Job -> state, from records.

    A record of a single job of an array takes precedence over one of the whole array; else the later record counts.
    """
    of_root: dict[str, list[str]] = {}
    for job in jobs:
        of_root.setdefault(_root(job), []).append(job)
    found: dict[str, JobState] = {}
    for fields in sorted(records, key=_is_divided):
        if mine := of_root.get(fields.get("ArrayJobId", fields.get("JobId", ""))):
            state = JobState(*(fields.get(name, "") for name in ("JobState", "Reason", "ExitCode", "NodeList")))
            found |= dict.fromkeys(_about(fields, mine), state)
    return found


def _is_divided(fields: dict[str, str]) -> bool:
    """Whether a record says which jobs of an array it is about. An array that was cancelled as a whole has none."""
    return fields.get("ArrayTaskId", UNDIVIDED) != UNDIVIDED


def _about(fields: dict[str, str], jobs: list[str]) -> list[str]:
    """The jobs, among these of the same array, that a record is about."""
    if not _is_divided(fields):
        return jobs
    named = {f"{fields['ArrayJobId']}_{number}" for number in _numbers(fields["ArrayTaskId"])}
    return [job for job in jobs if job in named]


def _numbers(text: str) -> Iterator[int]:
    """0-2,5,8-12:2%4 -> 0, 1, 2, 5, 8, 10, 12"""
    for part in text.split("%")[0].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def _root(job: str) -> str:
    return job.split("_")[0]


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _ask(*command: str) -> str:
    done = _call(*command)
    if done.returncode:
        raise NoAnswer(f"{command[0]}: {_said(done)}")
    return done.stdout


def _call(*command: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    try:
        env = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # print the task ids of an array without truncation
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience, check=False)
    except FileNotFoundError:
        raise NoAnswer(f"there is no command {command[0]} here; Slurm is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        took = time.monotonic() - began
        raise NoAnswer(f"Slurm does not answer ({command[0]} took more than {took:.0f} s); try again later") from None
    if "configuration source" in done.stderr:
        raise NoAnswer("Slurm's commands are here, but no cluster is configured; use a login node")
    return done


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and not line.startswith("Try ")]
    return "; ".join(lines) or f"exit code {done.returncode}"
