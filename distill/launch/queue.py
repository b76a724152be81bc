"""Submits the unfinished stages of a run as Slurm jobs with dependencies."""

from collections.abc import Collection, Sequence

from distill.core.atomic import write_atomic, write_json
from distill.core.errors import InputError, RunError
from distill.core.records import read_json
from distill.core.text import suggest
from distill.launch import script, slurm
from distill.launch.script import JobPlan, Where
from distill.launch.sites import SiteSource
from distill.runs import jobs
from distill.runs.run_store import RunPaths, append_event
from distill.spec import checks
from distill.spec.model import CacheStage, PairsStage, RunSpec, SlurmSpec


def plans(run: RunPaths, spec: RunSpec, stages: Sequence[str], parted: Collection[str] = ()) -> list[JobPlan]:
    """The jobs that compute these stages, with their dependencies.

    parted: pairs and cache stages whose parts are already queued or running.
    """
    options = spec.launch.slurm
    needs = {name: checks.needed(spec, name) for name in stages}
    if options.one_job:
        others = {target for each in needs.values() for target in each}
        return [JobPlan("all", list(stages), None, [], others)] if stages else []
    found: list[JobPlan] = []
    for name in stages:
        stage = spec.stages[name]
        after = [target for target in needs[name] if target in stages]
        if isinstance(stage, PairsStage | CacheStage) and options.pairs_jobs > 1 and name not in parted:
            missing = jobs.parts_to_make(run, spec, name)
            if missing:
                found.append(JobPlan(f"{name}.parts", [name], missing, after, needs[name]))
                after = [f"{name}.parts"]
        found.append(JobPlan(name, [name], None, list(dict.fromkeys(after)), needs[name]))
    return found


def check(spec: RunSpec, site: SiteSource) -> None:
    """Raise InputError for settings that Slurm or the site would refuse later."""
    check_partition(spec.launch.slurm, site)
    check_container(spec, site)


def check_partition(options: SlurmSpec, site: SiteSource) -> None:
    """Raise InputError unless the partition exists in Slurm and the site allows it."""
    slurm.require()
    known = slurm.partitions()
    partition = options.partition or site.site.partition
    allowed = site.site.partitions or known
    for name in site.site.partitions:
        if name not in known:
            raise InputError(f"{site.path}: partitions: Slurm has no partition '{name}'; {suggest(name, known)}")
    if partition is not None and partition not in (allowed if partition in known else known):
        raise InputError(
            f"launch.slurm.partition: '{partition}' is not a partition for distill jobs; {suggest(partition, allowed)}"
        )


def check_container(spec: RunSpec, site: SiteSource) -> None:
    """Raise InputError if the spec sets a container but the site has no container runtime."""
    if spec.launch.slurm.container is not None and site.site.container.runtime == "none":
        raise InputError(
            f"launch.slurm.container: {spec.launch.slurm.container} given, but {site.path} sets no container.runtime; "
            "valid: pyxis, apptainer"
        )


def submit(
    run: RunPaths, spec: RunSpec, stages: Sequence[str], where: Where, parted: Collection[str] = ()
) -> dict[str, JobPlan]:
    """Submit the `plans` of these stages as jobs; returns job id -> plan.

    If Slurm refuses a job, all are cancelled, and InputError is raised. If Slurm stops answering, the jobs so far stay
    queued, and RunError is raised.
    """
    sent: dict[str, str] = {}
    live, planned = live_jobs(run), plans(run, spec, stages, parted)
    scripts = {plan.name: script.job(run, spec.launch, plan, where) for plan in planned}
    try:
        run.jobs.mkdir(exist_ok=True)
        run.logs.mkdir(exist_ok=True)
        for plan in planned:
            path = run.jobs / f"{plan.name}.sbatch"
            write_atomic(path, scripts[plan.name])
            write_json(path.with_suffix(".json"), {"stages": plan.stages, "parts": plan.parts})
            after = [sent[name] for name in plan.after if name in sent]
            needs = {*plan.needs, *plan.stages}  # its own stages: their parts may be computed by other jobs
            after += [job.id for job in live if needs & set(job.stages)]
            waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
            sent[plan.name] = job = slurm.submit(path, waits)
            jobs.append(run, job, "submitted", stages=plan.stages, parts=plan.parts, script=path.name, after=after)
    except InputError:
        slurm.cancel(list(sent.values()))
        raise
    except slurm.NoAnswer as error:
        queued = ", ".join(sent.values()) or "no job"
        raise RunError(
            f"{error}; submitted so far: {queued}; submit the rest with: distill submit {run.root} --resume"
        ) from error
    current = {"code": str(where.code)} if where.code != run.code else {}
    append_event(run, "submitted", jobs=sent, **current)
    return {sent[plan.name]: plan for plan in planned}


def live_jobs(run: RunPaths) -> list[jobs.Job]:
    """The submissions of a run that are queued or running, oldest first.

    Includes jobs whose submitting process was killed before it could record them; they are recorded now.
    """
    known = {job.id: job for job in jobs.submitted(run)}
    found = []
    for number, name in slurm.queued(script.comment(run)).items():
        if number not in known:
            path = run.jobs / f"{name.removeprefix(f'{run.name}.')}.sbatch"
            jobs.append(run, number, "submitted", **read_json(path.with_suffix(".json")), script=path.name, after=[])
            known = {job.id: job for job in jobs.submitted(run)}
        found.append(known[number])
    return sorted(found, key=lambda job: (job.time, len(job.id), job.id))


def parted(run: RunPaths, spec: RunSpec, live: Sequence[jobs.Job]) -> list[str]:
    """The pairs and cache stages of which only parts are queued or running, without the job that completes the stage.

    Raises InputError if one of the parts has failed.
    """
    whole = {name for job in live if job.parts is None for name in job.stages}
    found = {job.stages[0]: job for job in live if job.parts is not None and not whole.issuperset(job.stages)}
    states = slurm.states([member for job in found.values() for member in job.members])
    for name, job in found.items():
        assert job.parts is not None
        missing = jobs.parts_to_make(run, spec, name)
        for part, member in zip(job.parts, job.members, strict=True):
            if part in missing and not (member in states and states[member].is_live):
                raise InputError(
                    f"job {member} failed while other parts of stage '{name}' are still running or queued in array "
                    f"{job.id}; wait for them and resume again, or cancel them with: distill cancel {run.name}"
                )
    return list(found)
