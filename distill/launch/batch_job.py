"""The main process of a Slurm job, on its first node. It starts the processes of the stages with srun, forwards signals
to them, and decides whether the job is queued again.

It replaces the shell of the job script (exec), so that it receives signals directly. Slurm sends USR1 some time before
the time limit and at a preemption. It sends TERM if the job is cancelled or requeued; in the grace period of a
preempted job, only the processes receive TERM. In all these cases, all ranks finish the same step, save and exit with
code 75. The job must then requeue itself, since Slurm counts a job that exits as ended, whatever its exit code.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from distill.core.errors import EXIT_FAILED, EXIT_INPUT, EXIT_PEER, EXIT_STOPPED, RunError
from distill.core.printing import say
from distill.launch import environment, ranks, script, slurm, tasks
from distill.launch.local import RANK_VARIABLES
from distill.launch.slurm import NoAnswer
from distill.runs import claims, jobs, todo
from distill.runs.progress import stamp
from distill.runs.run_store import RunPaths, append_event
from distill.spec import clusterspec
from distill.spec.model import RunSpec, TrainStage

NEAR = 90.0  # a signal within lead + NEAR seconds of the time limit counts as sent for it, since Slurm checks it rarely
LOOK = 60.0  # seconds between two checks of how long saving takes
# All are forwarded as USR1, since srun itself reacts to the others.
PASSED_ON = dict.fromkeys((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT), signal.SIGUSR1)
ATTEMPTS = 3  # attempts to requeue a job
ASKED, LOST = jobs.ASKED, jobs.LOST
BY_STATE = {"PREEMPTED": "preempted", "NODE_FAIL": "node failure", "TIMEOUT": "time limit"}  # Slurm's state -> reason
BY_WORDS = {"PREEMPTION": "preempted", "NODE FAILURE": "node failure", "TIME LIMIT": "time limit", "JOB REQUEUE": ASKED}
ENDED_FOR = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT [\w:-]+(?: DUE TO ([A-Z ]+[A-Z]))?")


@dataclass(frozen=True)
class Verdict:
    """How a stage of the job ended."""

    why: str
    """done, refused, cancelled, crash, preempted, time limit, node failure, or ASKED"""
    code: int
    message: str = ""
    again: bool = False
    """whether to queue the job again"""


class OwnLog:
    """The job's own log, to which Slurm also writes why it ends the job."""

    def __init__(self) -> None:
        here = Path("/proc/self/fd/1")
        self.path = here.resolve() if here.exists() and here.resolve().is_file() else None
        self.begin = 0 if self.path is None else self.path.stat().st_size

    def reason(self, *, before: bool = False) -> str | None:
        """Why Slurm ended this attempt, or with `before` the one before it; None if the log does not say."""
        if self.path is None:
            return None
        content = self.path.read_bytes()
        text = (content[: self.begin] if before else content[self.begin :]).decode(errors="replace")
        found = ENDED_FOR.findall(text)
        if not found:
            return None
        return BY_WORDS.get(found[-1], ASKED) if found[-1] else "cancelled"


class BatchJob:
    """One attempt of one job."""

    def __init__(self, run: RunPaths, stages: list[str], part: tuple[int, int] | None, command: Sequence[str]) -> None:
        self.run, self.stages, self.part, self.command = run, stages, part, list(command)
        self.spec: RunSpec = todo.load_spec(run)
        self.job, self.restart = tasks.identity()
        self.slurm = self.spec.launch.slurm
        self.log = OwnLog()
        self._warned = False

    def execute(self, relay: ranks.Relay) -> int:
        """Compute the stages, one after the other, and return the exit code of the job."""
        self._explain()
        self._note("began", nodes=os.environ.get("SLURM_JOB_NODELIST", ""), stages=self.stages)
        self._bury()
        for index, name in enumerate(self.stages):
            if self.part is None and self.run.stage(name).done.exists():
                continue
            try:
                verdict = self._stage(name, index, relay)
            except (RunError, OSError) as error:
                verdict = self._crash(name, EXIT_FAILED, str(error))
            if verdict.why != "done":
                return self._end(name, verdict)
        self._note("ended", why="done", again=False, code=0)
        return 0

    def _stage(self, name: str, index: int, relay: ranks.Relay) -> Verdict:
        if relay.asked:
            return self._stopped(name, "no stage had started yet")
        ends = self.run.jobs / "ends" / f"{self.job}.{self.restart}.{name}"
        ends.mkdir(parents=True, exist_ok=True)
        relay.processes = []
        tail = [str(self.run.root), name, *([] if self.part is None else [f"--part={self.part[0]}/{self.part[1]}"])]
        env = self._environment(name, index, ends)
        size = int(env["SLURM_NTASKS"])
        self._say(f"stage {name}: {size} process{'es' if size > 1 else ''} on {os.environ.get('SLURM_JOB_NODELIST')}")
        process = subprocess.Popen([*self.command, *tail], env=env)
        relay.add(process)
        looked = time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                self._watch_lead()
        self._watch_lead()
        return self._judge(name, process.returncode, size, tasks.read(ends), bool(relay.asked))

    def _environment(self, name: str, index: int, ends: Path) -> dict[str, str]:
        """The environment of srun and all its processes. It also sets the number of processes that srun starts."""
        launch = self.spec.launch
        nodes, procs = (launch.nodes, launch.procs) if self.part is None else (1, 1)
        divided = isinstance(self.spec.stages[name], TrainStage) and launch.zero_stage is not None
        unit = name if self.part is None else f"{name}.{self.part[0]}"
        env = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
        env |= {"SLURM_NTASKS": str(nodes * procs), "SLURM_NPROCS": str(nodes * procs), "SLURM_NNODES": str(nodes)}
        env |= {"SLURM_NTASKS_PER_NODE": str(procs), tasks.ENDS: str(ends), tasks.UNIT: unit}
        for key in ("SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION"):
            env.pop(key, None)
        cpus = launch.slurm.cpus_per_task
        threads = launch.threads or cpus or max(1, int(env["SLURM_CPUS_ON_NODE"]) // procs)
        env |= environment.thread_variables(threads)
        if cpus is not None:
            env["SRUN_CPUS_PER_TASK"] = str(cpus)
        env.setdefault("HF_MODULES_CACHE", str(self.run.root / ".modules"))
        if nodes * procs > 1 or divided:
            port = script.port(env.get("SLURM_CLUSTER_NAME", ""), int(env["SLURM_JOB_ID"]), self.restart, index)
            env |= {"MASTER_ADDR": slurm.address(env["SLURM_JOB_NODELIST"]), "MASTER_PORT": str(port)}
        return env

    def _judge(self, name: str, code: int, size: int, ends: list[tasks.End], asked: bool) -> Verdict:
        """The verdict on a stage from the ends of its processes: the first one that failed by itself decides."""
        if code == 0 and self.part is None and not self.run.stage(name).done.exists():
            return self._crash(name, EXIT_FAILED, "all processes exited with code 0, but the stage is not finished")
        if code == 0:
            return Verdict("done", 0)
        failed = [end for end in ends if end.code not in (0, EXIT_STOPPED, EXIT_PEER)]
        refused = next((end for end in failed if end.code == EXIT_INPUT), None)
        if refused is not None:
            return Verdict("refused", EXIT_INPUT, refused.message)
        if failed:
            return self._crash(name, failed[0].code, f"rank {failed[0].rank}: {failed[0].message}")
        stopped = next((end for end in ends if end.code == EXIT_STOPPED), None)
        if asked or stopped is not None:
            early = "it received the signal during startup, so nothing new was saved"
            return self._stopped(name, stopped.message if stopped else early)
        silent = sorted(set(range(size)) - {end.rank for end in ends})
        lost = next((end.message for end in ends if end.code == EXIT_PEER), "")
        killed = (
            f"rank {', '.join(map(str, silent))} exited without an error message (killed? out of memory?)"
            if silent
            else ""
        )
        message = "; ".join(filter(None, [killed, lost])) or f"srun ended with code {code}"
        return self._crash(name, EXIT_FAILED, message)

    def _crash(self, name: str, code: int, message: str) -> Verdict:
        step = jobs.position(self.run, name, message)
        before = jobs.restarts(self.run, [self.job]).get("crash", 0)
        if jobs.crashed_before(self.run, self.job, name, step):
            where = "at the same place" if step is None else f"at step {step}"
            reason = f"the job crashed {where} for the second time"
        elif before >= self.slurm.max_crashes:
            reason = f"launch.slurm.max_crashes={before} is reached"
        else:
            return Verdict("crash", code, message, again=True)
        advice = f"fix the cause, then: distill submit {self.run.root} --resume"
        return Verdict("crash", code, f"{message}; {reason}, so it was not queued again; {advice}")

    def _stopped(self, name: str, message: str) -> Verdict:
        if (self.run.jobs / f"{self.job}.cancel").exists():
            return Verdict("cancelled", EXIT_STOPPED, message)
        why = self._why()
        if why == "time limit" and isinstance(self.spec.stages[name], TrainStage):
            step = jobs.position(self.run, name, message)
            if jobs.made_no_step(self.run, self.job, name, step):
                reason = "this was the third time in a row without a new step, so the job was not queued again"
                advice = "use a longer launch.slurm.time, or a shorter launch.slurm.lead_seconds, then: distill submit"
                return Verdict(why, EXIT_STOPPED, f"{message}; {reason}; {advice} {self.run.root} --resume")
        return Verdict(why, EXIT_STOPPED, message, again=why != "cancelled")

    def _why(self) -> str:
        """Why the job was asked to stop, by Slurm or by a user."""
        said = self.log.reason()
        if said is not None:
            return said
        try:
            fields = slurm.show(self.job)
        except NoAnswer:
            return ASKED
        state = fields.get("JobState", "")
        if state == "COMPLETING" and not self._is_queued_again(fields):
            ran, limit = (clusterspec.limit_seconds(fields.get(name, "")) for name in ("RunTime", "TimeLimit"))
            return "time limit" if ran is not None and limit is not None and ran >= limit else "cancelled"
        if state == "PREEMPTED" or fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):
            return "preempted"
        end = fields.get("EndTime", "")
        if re.fullmatch(r"[\d-]+T[\d:]+", end):
            left = (datetime.fromisoformat(end) - datetime.now()).total_seconds()  # Slurm's times are local
            if state == "RUNNING" and left < self.lead + NEAR:
                return "time limit"
        return ASKED

    def _explain(self) -> None:
        """Record why the last attempt ended if it did not know or recorded nothing: Slurm knows it by now."""
        known = {line["restart"] for line in jobs.ends(self.run, self.job)}
        for restart in sorted(set(range(self.restart)) - known):
            message = "ended without an error message"
            jobs.append(self.run, self.job, "ended", restart=restart, why=LOST, again=True, message=message)
        last = next(reversed(jobs.ends(self.run, self.job)), None)
        if last is None or last["why"] not in (ASKED, LOST):
            return
        try:
            state = slurm.previous_state(self.job)
        except NoAnswer:
            state = ""
        why = BY_STATE.get(state) or self.log.reason(before=True)
        if why is not None and why != last["why"]:
            jobs.append(self.run, self.job, "explained", restart=last["restart"], why=why)

    def _end(self, name: str, verdict: Verdict) -> int:
        step = jobs.position(self.run, name, verdict.message)
        fields = {"why": verdict.why, "code": verdict.code, "message": verdict.message, "again": verdict.again}
        self._note("ended", stage=name, step=step, **fields)
        self._say(f"stage {name}: {jobs.shown(verdict.why)}: {verdict.message}")
        if verdict.again:
            trouble = self._queue_again()
            if trouble:
                message = f"could not be queued again ({trouble}); resume with: distill submit {self.run.root} --resume"
                self._note("ended", stage=name, step=step, **fields | {"message": message, "again": False})
                self._say(f"the job {message}")
            else:
                self._say("queued again")
        return verdict.code

    def _queue_again(self) -> str:
        """Queue the job again, unless Slurm has done so; returns "" on success, else why it failed."""
        trouble = "no requeue request was sent"
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            try:
                if self._is_queued_again(slurm.show(self.job)):
                    return ""
            except NoAnswer as error:
                trouble = str(error)
            trouble = slurm.requeue(self.job)
            if not trouble:
                return ""
        return trouble

    def _is_queued_again(self, fields: dict[str, str]) -> bool:
        """Whether Slurm has already queued the job again while this process was still running."""
        return int(fields.get("Restarts", "0")) > self.restart

    @property
    def lead(self) -> float:
        return float(self.slurm.lead_seconds)

    def _watch_lead(self) -> None:
        """Warn once if saving takes so long that the lead time before the time limit is too short."""
        needed = jobs.lead_needed(self.run)
        if needed > self.lead and not self._warned:
            self._warned = True
            text = (
                f"saving took {(needed - jobs.SPARE) / jobs.ATTEMPT:.0f} s, so launch.slurm.lead_seconds="
                f"{self.slurm.lead_seconds} is too short to save before the time limit; "
                f"`distill submit {self.run.root} --resume` will use {needed:.0f} s"
            )
            self._say(f"warning: {text}")
            append_event(self.run, "warning", label=self.job, text=text)

    def _bury(self) -> None:
        """Remove the claims of jobs that Slurm says have ended; their processes may have been on other hosts."""
        for place, owner in claims.held(self.run).items():
            if owner.job and owner.job != self.job and not owner.is_here:
                try:
                    over = not slurm.states([owner.job]).get(owner.job, slurm.JobState("COMPLETED")).is_live
                except NoAnswer:
                    over = False
                if over:
                    claims.bury(self.run, place, owner)

    def _note(self, event: str, **fields: object) -> None:
        jobs.append(self.run, self.job, event, restart=self.restart, **fields)

    def _say(self, text: str) -> None:
        say(f"{stamp()}  job {self.job}: {text}", flush=True)


def execute(run: RunPaths, stages: list[str], part: tuple[int, int] | None, command: Sequence[str]) -> int:
    """Run the main process of a job, and return its exit code.

    part: (i, n) of a pairs or cache stage. command: starts the processes of a stage; the run and the stage are appended
    to it.
    """
    with ranks.Relay(PASSED_ON) as relay:
        return BatchJob(run, stages, part, command).execute(relay)
