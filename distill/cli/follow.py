"""`distill status` and `logs`: the progress of runs, on this machine or a cluster, and the logs of their processes."""

import re
import time
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.common import JsonOption, StoreOption, near, print_json, print_table, store_path
from distill.cli.runs import RunArgument, headline, numbers, print_rows, say_how_to_resume, stages_done, warn_of_damage
from distill.core import records
from distill.core.errors import InputError
from distill.core.printing import clear, say
from distill.runs.progress import duration
from distill.runs.run_store import RunPaths, find_run, runs

if TYPE_CHECKING:
    import distill.launch.standing
    import distill.reports.run_status
    import distill.runs.log_files

WATCH_SECONDS = 5.0
POLL = 0.5  # seconds between two reads of a log
MOMENT = "%Y-%m-%d %H:%M:%S"
LINES = 1000  # default number of lines of a log that are printed
RANK_LOG = re.compile(
    r"(?:(?P<stage>.+?)(?:\.parts(?:\.\d+)?)?\.)?rank-(?P<rank>[0-9]+)\.log"
)  # without a stage for a run on one machine
JOB_LOG = re.compile(r"(?P<stage>.+?)(?:\.parts)?\.\d+(?:_\d+)?\.job\.log")
AGO = re.compile(r"([0-9]{1,9})(s|min|m|h|d)")
UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days"}


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; by default all runs of the store.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds until Ctrl-C.")] = False,
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Show the progress of runs: jobs, stages, rate, time left, checkpoints, restarts and their causes."""
    folder = store_path(store)
    while True:
        if watch and not json:
            clear()
        _status(folder, run, json)
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def _status(folder: Path, run: str | None, json: bool) -> None:
    from distill.launch import standing

    if run is not None:
        paths = find_run(folder, run)
        found = standing.read([paths])
        if json:
            print_json(_as_json(found[0]))
        else:
            _print_one(paths, found[0])
    else:
        found = standing.read(runs(folder), brief=True)
        if json:
            print_json([_as_json(each) for each in found])
        else:
            _print_all(folder, found)
    if found and (trouble := next((each.trouble for each in found if each.trouble), "")) and not json:
        say(f"warning: {trouble}; the output above uses only the runs' own events, not Slurm's job states")


def _as_json(standing: "distill.launch.standing.Standing") -> dict[str, Any]:
    from distill.reports import run_status

    jobs = [asdict(job) | {"state": job.state, "reason": job.reason} for job in standing.jobs]
    state = {"state": standing.state, "message": standing.message}
    metrics: dict[str, dict[str, float]] = {}
    if standing.run.state != run_status.DAMAGED:
        cards = run_status.students(RunPaths(Path(standing.run.path)))
        metrics = {name: card.metrics for name, card in cards.items()}
    return asdict(standing.run) | state | {"jobs": jobs, "metrics": metrics, "trouble": standing.trouble}


def _print_all(folder: Path, found: "list[distill.launch.standing.Standing]") -> None:
    from distill.reports import run_status

    if not found:
        say(f"no runs in {near(folder.absolute())}; start one with: distill run digits")
        return
    rows = []
    for each in found:
        done = sum(stage.state == "done" for stage in each.run.stages)
        current = next((stage for stage in each.run.stages if stage.state == "begun"), None)
        at = "" if current is None else f"{current.name} {_progress(current)}".strip()
        restarts = sum(sum(job.restarts.values()) for job in each.jobs)
        ago = run_status.age(each.run.changed)
        rows.append([each.run.name, each.state, stages_done(done, each.run), at, str(restarts or ""), ago])
    print_rows(["run", "state", "stages", "at", "restarts", "last event"], rows)
    warn_of_damage(each.run for each in found)


def _print_one(paths: RunPaths, standing: "distill.launch.standing.Standing") -> None:
    from distill.reports import run_status
    from distill.runs.jobs import shown

    students = run_status.students(paths)
    say(headline(standing.run.name, standing.state, standing.message, standing.run.changed))
    rows = []
    for stage in standing.run.stages:
        mine = [job for job in standing.jobs if stage.name in job.stages]
        left = stage.seconds_left
        saved = "" if stage.saved is None else f"step {stage.saved_step}, {run_status.age(stage.saved)}"
        progress = (
            _shards(paths, stage.name) if stage.kind in ("pairs", "cache") and stage.done is None else _progress(stage)
        )
        rate = "" if stage.per_second is None else f"{stage.per_second:,.1f}/s"
        eta = "" if left is None else duration(left)
        rows.append([stage.name, stage.kind, stage.state, _jobs(mine), progress, rate, eta, saved, numbers(stage.logs)])
    columns = ["stage", "kind", "state", "job", "progress", "rate", "ETA", "last checkpoint", "last losses"]
    used = [i for i in range(len(columns)) if i < 3 or any(row[i] for row in rows)]
    print_table([columns[i] for i in used], [[row[i] for i in used] for row in rows])
    for name, card in students.items():
        measured = next((f"{key} {value:.4g}" for key, value in card.metrics.items()), "not measured yet")
        say(f"student {name}: {measured}")
    for job in standing.jobs:
        if job.restarts:
            counts = ", ".join(f"{count} x {shown(why)}" for why, count in job.restarts.items())
            say(f"job {job.job} was queued again: {counts}")
    if "--resume" not in standing.message:  # as the message of a job that crashed
        say_how_to_resume(paths, standing.state, in_jobs=bool(standing.jobs))


def _jobs(jobs: "list[distill.launch.standing.StageJob]") -> str:
    return "\n".join(f"{job.job} {job.state}{f' ({job.reason})' if job.reason else ''}" for job in jobs)


def _shards(paths: RunPaths, stage: str) -> str:
    from distill.launch import standing

    count = standing.shards(paths, stage)
    return f"{count} shard{'s' if count > 1 else ''}" if count else ""


def _progress(stage: "distill.reports.run_status.StageStatus") -> str:
    return "" if stage.done is None or not stage.total else f"{stage.done:,}/{stage.total:,} {stage.unit}"


# --- logs ---


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new lines until the run ends.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to print.")] = 0,
    stage: Annotated[
        str | None, typer.Option(help="Stage whose log to print; by default the one with the newest lines.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Print only lines since 90s, 10m, 2h or 1d ago, or since a time like '2026-11-25 17:40:00'."),
    ] = None,
    lines: Annotated[
        int | None,
        typer.Option("-n", "--lines", min=0, help=f"Number of last lines to print; 0: all. By default {LINES:,}."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Print the logs of a run: the first traceback of any process, then the lines of the job and of a rank."""
    from distill.runs import log_files

    paths = find_run(store_path(store), run)
    begin = None if since is None else _moment(since)
    if follow:
        _await(paths)
    chosen = _choose(paths, rank, stage)
    first = _first_failure(paths)
    if first is not None:
        say(f"--- first traceback: rank {first.rank} at {first.time}, {near(first.path)}")
        say(first.text, end="" if first.text.endswith("\n") else "\n")
    at: dict[Path, int] = {}
    for path in chosen:
        place, what = _begin(path, begin, lines)
        say(f"--- {near(path)}{what}")
        at[path] = log_files.write(path, place, unfinished=not follow)
    if follow:
        _follow(paths, rank, stage, at)


def _begin(path: Path, since: datetime | None, lines: int | None) -> tuple[int, str]:
    """(offset in a log at which to start, text about what is left out)."""
    from distill.runs import log_files

    with records.open_regular(path) as file:
        first = 0 if since is None else log_files.first_since(file, since.strftime(MOMENT))
        count = (LINES if since is None else 0) if lines is None else lines
        last = log_files.last_lines(file, count) if count else 0
    if last <= first:
        return first, ""
    return last, f"  (last {count:,} lines; use --lines 0 for the whole log)"


def _files(paths: RunPaths) -> list[Path]:
    """All logs of a run, sorted by name."""
    found = (paths.logs / name for name in records.names(paths.logs) if name.endswith(".log"))
    return [path for path in found if path.is_file()]


def _choose(paths: RunPaths, rank: int, stage: str | None) -> list[Path]:
    """The logs to print for a stage: the newest log of its jobs, and the logs of the rank.

    stage: None: the one with the newest log. Raises InputError if there is no such log.
    """
    files = _files(paths)
    ranks = {path: match for path in files if (match := RANK_LOG.fullmatch(path.name))}
    jobs = {path: match for path in files if (match := JOB_LOG.fullmatch(path.name))}
    stages = {path: match["stage"] or "" for path, match in (ranks | jobs).items()}
    if stage is not None and stage not in stages.values():
        known = ", ".join(sorted(set(stages.values()) - {""})) or "none yet"
        raise InputError(f"stage '{stage}' of run '{paths.name}' has no logs in {near(paths.logs)}; valid: {known}")
    if not stages:
        raise InputError(
            f"run '{paths.name}' has no logs: on one machine, rank 0 prints to the terminal, and only the other ranks "
            "write logs"
        )

    def age(path: Path) -> float:
        return path.stat().st_mtime

    name = stages[max(stages, key=age)] if stage is None else stage
    of_rank = [path for path, match in ranks.items() if stages[path] == name and int(match["rank"]) == rank]
    numbers = sorted({int(match["rank"]) for path, match in ranks.items() if stages[path] == name})
    if numbers and not of_rank:
        raise InputError(f"--rank {rank} has no log; there are logs of ranks {', '.join(map(str, numbers))}")
    return sorted((path for path in jobs if stages[path] == name), key=age)[-1:] + sorted(of_rank)


def _first_failure(paths: RunPaths) -> "distill.runs.log_files.Failure | None":
    """The earliest traceback in the logs, without those of earlier attempts of jobs; None if there is none."""
    from distill.runs import jobs, log_files

    began: dict[str, str] = {}  # by the logs' names up to the rank
    for job in jobs.submitted(paths):
        for member in job.members:
            names = [job.script.removesuffix(".sbatch"), *member.split("_")[1:], ""]
            for line in jobs.history(paths, member):
                if line["event"] == "began":
                    began[".".join(names)] = datetime.fromtimestamp(line["time"]).strftime(MOMENT)  # noqa: DTZ006
    found = [
        failure
        for path in _files(paths)
        if "rank-" in path.name
        for failure in log_files.failures(path)
        if failure.time >= began.get(path.name.rpartition("rank-")[0], "")
    ]
    return min(found, key=lambda failure: (failure.time, failure.rank), default=None)


def _await(paths: RunPaths) -> None:
    """Wait until there is a log, or until no process of the run is left."""
    while not _files(paths) and _is_live(paths):
        time.sleep(WATCH_SECONDS)


def _follow(paths: RunPaths, rank: int, stage: str | None, at: dict[Path, int]) -> None:
    from distill.runs import log_files

    looked = time.monotonic()
    while True:
        live = time.monotonic() - looked < WATCH_SECONDS or _is_live(paths)
        if time.monotonic() - looked >= WATCH_SECONDS:
            looked = time.monotonic()
        for path in _choose(paths, rank, stage):
            if path not in at:
                say(f"--- {near(path)}")
            at[path] = log_files.write(path, at.get(path, 0), unfinished=not live)
        if not live:
            return
        time.sleep(POLL)


def _is_live(paths: RunPaths) -> bool:
    from distill.launch import queue, slurm
    from distill.runs import claims

    if claims.executing(paths) is not None:
        return True
    try:
        return bool(paths.jobs.is_dir() and queue.live_jobs(paths))
    except slurm.NoAnswer:
        return True


def _moment(text: str) -> datetime:
    match = AGO.fullmatch(text.strip())
    try:
        if match is not None:
            return datetime.now() - timedelta(**{UNITS[match[2]]: int(match[1])})  # noqa: DTZ005
        return datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise InputError(f"--since {text}: must be 90s, 10m, 2h, 1d, or a time like 2026-11-25 17:40:00") from None
