"""From the stages that a run still has to do to jobs in Slurm's queue: their scripts, and in which order."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from distill import jobs, workflow
from distill.guard import InputError, suggest
from distill.launch import environment, slurm
from distill.launch.site import Site, SiteSource
from distill.spec import PairsStage, RunSpec, TrainStage
from distill.store import RunPaths, append_event, read_json, write_atomic, write_json

TEMPLATES = environment.ROOT / "slurm"


@dataclass(frozen=True)
class Plan:
    """A job to be submitted."""

    name: str
    """of its script and logs"""
    stages: list[str]
    parts: list[int] | None
    """of the array; null: one job"""
    after: list[str]
    """names of jobs of the same submission that must end well first"""


@dataclass(frozen=True)
class Where:
    """What the jobs of a submission share."""

    site: SiteSource
    code: Path
    """the folder that holds the package"""
    inputs: dict[str, str]
    """variables that lead to what the run reads from a hub"""


def plans(run: RunPaths, spec: RunSpec, stages: Sequence[str]) -> list[Plan]:
    """The jobs that compute these stages, each after those that it needs."""
    options = spec.launch.slurm
    if options.one_job:
        return [Plan("all", list(stages), None, [])] if stages else []
    found: list[Plan] = []
    for name in stages:
        stage = spec.stages[name]
        after = [target for _, target, _ in workflow.references(stage) if target in stages]
        if isinstance(stage, PairsStage) and options.pairs_jobs > 1:
            missing = jobs.missing_parts(stage, run.stage(name).pairs, options.pairs_jobs)
            if missing:
                found.append(Plan(f"{name}.parts", [name], missing, after))
                after = [f"{name}.parts"]
        found.append(Plan(name, [name], None, list(dict.fromkeys(after))))
    return found


def script(run: RunPaths, spec: RunSpec, plan: Plan, where: Where) -> str:
    """The text that Slurm runs for a job."""
    site, options = where.site.site, spec.launch.slurm
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    templates.undefined = jinja2.StrictUndefined
    templates.filters |= {"quote": _quote, "double_quote": _double_quote}
    parts = f"{min(plan.parts)}-{max(plan.parts)}" if plan.parts else ""
    python = site.python or sys.executable
    mask = os.umask(0)
    os.umask(mask)
    return templates.get_template("job.sbatch").render(
        run=run,
        what=", ".join(plan.stages) + (f", parts {parts} of {options.pairs_jobs}" if plan.parts else ""),
        options=_options(run, spec, plan, site),
        umask=f"{mask:04o}",
        site=site,
        site_path=where.site.path,
        variables={**site.environment, **{k: v for k, v in site.caches.model_dump().items() if v is not None}},
        code=where.code,
        code_comment="the package as it was when this was submitted"
        if where.code == run.code
        else "the package as it is when the job begins (--code current)",
        inputs=where.inputs,
        python=python,
        inner_python=python if options.container is None else site.container.python,
        stages=plan.stages,
        part="" if plan.parts is None else f' --part="$SLURM_ARRAY_TASK_ID/{options.pairs_jobs}"',
        log=run.logs / f"{plan.name}{'.%a' if plan.parts else ''}.rank-%t.log",
        container=_container(options.container, site, run),
    )


def check(spec: RunSpec, site: SiteSource) -> None:
    """Refuse what Slurm, or the site, would refuse once the run is made, or later."""
    slurm.require()
    known, options = slurm.partitions(), spec.launch.slurm
    partition = options.partition or site.site.partition
    allowed = site.site.partitions or known
    for name in site.site.partitions:
        if name not in known:
            raise InputError(f"{site.path}: partitions: Slurm has no partition '{name}'; {suggest(name, known)}")
    if partition is not None and partition not in (allowed if partition in known else known):
        raise InputError(
            f"launch.slurm.partition: there is no partition '{partition}' for our jobs; {suggest(partition, allowed)}"
        )
    check_container(spec, site)


def check_container(spec: RunSpec, site: SiteSource) -> None:
    """A container needs a runtime."""
    if spec.launch.slurm.container is not None and site.site.container.runtime == "none":
        raise InputError(
            f"launch.slurm.container: {spec.launch.slurm.container} given, but {site.path} names no container.runtime; "
            "valid: pyxis, apptainer"
        )


def submit(run: RunPaths, spec: RunSpec, planned: Sequence[Plan], where: Where) -> dict[str, str]:
    """Queue jobs, each after those that it needs: their numbers by name. All of them, or none."""
    sent: dict[str, str] = {}
    live = live_jobs(run)
    try:
        run.jobs.mkdir(exist_ok=True)
        run.logs.mkdir(exist_ok=True)
        for plan in planned:
            path = run.jobs / f"{plan.name}.sbatch"
            write_atomic(path, script(run, spec, plan, where))
            write_json(path.with_suffix(".json"), {"stages": plan.stages, "parts": plan.parts})
            after = [sent[name] for name in plan.after if name in sent]
            needs = {target for name in plan.stages for _, target, _ in workflow.references(spec.stages[name])}
            after += [job.id for job in live if needs & set(job.stages)]
            waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
            sent[plan.name] = job = slurm.submit(path, waits)
            jobs.append(run, job, "submitted", stages=plan.stages, parts=plan.parts, script=path.name, after=after)
    except InputError:
        slurm.cancel(list(sent.values()))
        raise
    current = {"code": str(where.code)} if where.code != run.code else {}
    append_event(run, "submitted", jobs=sent, **current)
    return sent


def live_jobs(run: RunPaths) -> list[jobs.Job]:
    """The submissions of a run that wait or run; those that were submitted by a process that was killed then, too."""
    known = {job.id: job for job in jobs.submitted(run)}
    found = []
    for number, name in slurm.queued(comment(run)).items():
        if number not in known:
            path = run.jobs / f"{name.removeprefix(f'{run.name}.')}.sbatch"
            jobs.append(run, number, "submitted", **read_json(path.with_suffix(".json")), script=path.name, after=[])
            known = {job.id: job for job in jobs.submitted(run)}
        found.append(known[number])
    return found


def comment(run: RunPaths) -> str:
    """What the jobs of a run carry, so that they are found even by who does not know their numbers."""
    return f"distill:{run.root}"


def _options(run: RunPaths, spec: RunSpec, plan: Plan, site: Site) -> list[str]:
    options, launch = spec.launch.slurm, spec.launch
    trains = [isinstance(spec.stages[name], TrainStage) for name in plan.stages]
    nodes, procs = (launch.nodes, launch.procs) if any(trains) else (1, 1)
    gpus = options.gpus_per_node if any(trains) else min(1, options.gpus_per_node)
    parts = None if plan.parts is None else ",".join(map(str, plan.parts))
    log = run.logs / f"{plan.name}.{'%A_%a' if plan.parts else '%j'}.job.log"
    given = {
        "job-name": f"{run.name}.{plan.name}",
        "comment": comment(run),
        "array": parts,
        "nodes": nodes,
        "ntasks-per-node": procs,
        "cpus-per-task": options.cpus_per_task,
        "gpus-per-node": gpus or None,
        "mem": options.memory,
        "partition": options.partition or site.partition,
        "account": options.account or site.account,
        "qos": options.qos or site.qos,
        "time": options.time,
        "signal": f"B:USR1@{options.lead_seconds}",
        "output": log,
        "open-mode": "append",
    }
    lines = [f"--{name}={_quote(value)}" for name, value in given.items() if value is not None]
    return [*lines, "--requeue", *site.options, *options.options]


def _container(image: str | None, site: Site, run: RunPaths) -> str:
    """What stands between srun and the interpreter."""
    if image is None:
        return ""
    folders = list(dict.fromkeys([str(run.root.parent), *site.container.mounts]))
    if site.container.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        words = [f"--container-image={image}", f"--container-mounts={mounts}", *site.container.options]
    else:
        binds = [f"--bind={folder}" for folder in folders]
        words = ["apptainer", "exec", *binds, *site.container.options, image]
    return shlex.join(words)


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def _double_quote(value: object) -> str:
    """Quoted, but for variables, which the shell still fills in: /scratch/$USER."""
    return '"' + "".join(f"\\{c}" if c in '"\\`' else c for c in str(value)) + '"'


def described(plan: Plan, spec: RunSpec) -> Sequence[str]:
    """A row for people: name, what it computes, on what."""
    launch = spec.launch
    trains = any(isinstance(spec.stages[name], TrainStage) for name in plan.stages)
    where = f"{launch.nodes} x {launch.procs}" if trains else "1 x 1"
    kind = f"array of {len(plan.parts)}" if plan.parts else ", ".join(plan.stages)
    return [plan.name, kind, where, ", ".join(plan.after)]
