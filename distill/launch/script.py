"""Renders job scripts from the templates in slurm/."""

import os
import re
import shlex
import sys
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from distill.core.errors import InputError
from distill.core.text import is_line
from distill.launch import environment
from distill.launch.sites import Site, SiteSource
from distill.runs.run_store import RunPaths
from distill.spec.model import LaunchSpec, SlurmSpec

TEMPLATES = environment.ROOT / "slurm"
# Characters to escape within "...". The shell still expands $NAME, ${NAME} and ${NAME:-text}, but runs no commands.
ESCAPED = re.compile(r"""["\\`]|\$(?![A-Za-z_]|\{[A-Za-z_][A-Za-z0-9_]*(:?-[\w./~ -]*)?\})""", re.ASCII)
PORTS = range(61000, 65500)  # above the ports that the kernel uses for outgoing connections


@dataclass(frozen=True)
class JobPlan:
    """A job to be submitted."""

    name: str
    """name of its script and logs"""
    stages: list[str]
    parts: list[int] | None
    """parts of a job array, each of which is computed by one process; None: all processes compute its stages"""
    after: list[str]
    """names of jobs of the same submission that must succeed first"""
    needs: Collection[str] = ()
    """stages, of this submission or an earlier one, that must be done first"""

    def described(self, launch: LaunchSpec) -> list[str]:
        """Cells of a table row: name, what it computes, nodes x processes, jobs that it waits for."""
        where = "1 x 1" if self.parts else f"{launch.nodes} x {launch.procs}"
        kind = f"array of {len(self.parts)}" if self.parts else ", ".join(self.stages)
        return [self.name, kind, where, ", ".join(self.after)]


@dataclass(frozen=True)
class Where:
    """The settings that all jobs of a submission share."""

    site: SiteSource
    code: Path
    """folder that contains the package"""
    inputs: dict[str, str]
    """environment variables that point to the inputs fetched from the hub"""


def job(run: RunPaths, launch: LaunchSpec, plan: JobPlan, where: Where) -> str:
    """The job script for a plan of a run."""
    options = launch.slurm
    parts = f", parts {', '.join(map(str, plan.parts))} of {options.pairs_jobs}" if plan.parts else ""
    return _render(
        "job.sbatch",
        _header(run, launch, plan, where.site.site),
        where,
        options.container,
        run.root.parent,
        {
            "run": run,
            "what": f"{', '.join(plan.stages)}{parts}",
            "code_comment": "the copy of the package made at submission"
            if where.code == run.code
            else "the package as installed when the job starts (--code current)",
            "inputs": where.inputs,
            "stages": plan.stages,
            "part": "" if plan.parts is None else f' --part="$SLURM_ARRAY_TASK_ID/{options.pairs_jobs}"',
            "log": _pattern(run.logs) / f"{plan.name}{'.%a' if plan.parts else ''}.rank-%t.log",
        },
    )


def doctor(folder: Path, options: SlurmSpec, nodes: int, where: Where) -> str:
    """The script of the job of `distill doctor --site`, whose processes write their findings to a folder."""
    given = {
        "job-name": "distill.doctor",
        "nodes": nodes,
        "ntasks-per-node": max(1, options.gpus_per_node),
        "gpus-per-node": options.gpus_per_node or None,
        **_ours(options, where.site.site),
        "time": "1",
        "output": _pattern(folder) / "job.log",
    }
    lines = [*_lines(given), *where.site.site.options, *options.options]
    fields = {"folder": folder, "code_comment": "the package of `distill doctor`"}
    return _render("doctor.sbatch", lines, where, options.container, folder.parent, fields)


def port(cluster: str, job: int, restart: int, launch: int) -> int:
    """The rendezvous port of the ranks of a job.

    It differs between launches of one job, and usually between jobs that share a host, even of two clusters.
    """
    return PORTS[(zlib.crc32(cluster.encode()) + job * 64 + restart * 8 + launch) % len(PORTS)]


def comment(run: RunPaths) -> str:
    """The comment of all jobs of a run, by which they are found without their ids."""
    return f"distill:{run.root}"


def _render(
    template: str, lines: list[str], where: Where, image: str | None, store: Path, fields: Mapping[str, object]
) -> str:
    site = where.site.site
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_one_line
    )
    templates.undefined = jinja2.StrictUndefined
    templates.filters |= {"quote": _quote, "double_quote": _double_quote}
    python = site.python or sys.executable
    caches = {name: path for name, path in site.caches.model_dump().items() if path is not None}
    mask = os.umask(0)
    os.umask(mask)
    return templates.get_template(template).render(
        options=lines,
        umask=f"{mask:04o}",
        site=site,
        site_path=where.site.path,
        variables={**site.environment, **caches},
        caches=caches,
        code=where.code,
        python=python,
        inner_python=python if image is None else site.container.python,
        container=_container(image, site, store),
        **fields,
    )


def _header(run: RunPaths, launch: LaunchSpec, plan: JobPlan, site: Site) -> list[str]:
    options, together = launch.slurm, plan.parts is None
    gpus = options.gpus_per_node if together else min(1, options.gpus_per_node)
    given = {
        "job-name": f"{run.name}.{plan.name}",
        "comment": comment(run),
        "array": None if plan.parts is None else ",".join(map(str, plan.parts)),
        "nodes": launch.nodes if together else 1,
        "ntasks-per-node": launch.procs if together else 1,
        "cpus-per-task": options.cpus_per_task,
        "gpus-per-node": gpus or None,
        "mem": options.memory,
        **_ours(options, site),
        "time": options.time,
        "signal": f"B:USR1@{options.lead_seconds}",
        "output": _pattern(run.logs) / f"{plan.name}.{'%A_%a' if plan.parts else '%j'}.job.log",
        "open-mode": "append",
    }
    return [*_lines(given), "--requeue", *site.options, *options.options]


def _ours(options: SlurmSpec, site: Site) -> dict[str, object]:
    """The partition, account and quality of service of a job."""
    return {
        "partition": options.partition or site.partition,
        "account": options.account or site.account,
        "qos": options.qos or site.qos,
    }


def _lines(given: Mapping[str, object]) -> list[str]:
    return [f"--{name}={_quote(value)}" for name, value in given.items() if value is not None]


def _container(image: str | None, site: Site, store: Path) -> str:
    """The part of the command between srun and the interpreter that starts the container; "" without one."""
    if image is None:
        return ""
    folders = list(dict.fromkeys([str(store), *site.container.mounts]))
    if {",", ":"} & {*str(store)}:
        raise InputError(f"{store} cannot be mounted in a container: it contains a comma or a colon; rename it")
    if site.container.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        words = [f"--container-image={image}", f"--container-mounts={mounts}", "--no-container-entrypoint"]
        words += site.container.options
    else:
        binds = [f"--bind={folder}" for folder in folders]
        words = ["apptainer", "exec", *binds, *site.container.options, image]
    return shlex.join(words)


def _pattern(folder: Path) -> Path:
    """A folder with % escaped, since % begins a pattern in Slurm's file names."""
    return Path(str(folder).replace("%", "%%"))


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def _double_quote(value: object) -> str:
    """The value in double quotes. The shell still expands variables, as in /scratch/$USER."""
    return '"' + ESCAPED.sub(r"\\\g<0>", str(value)) + '"'


def _one_line(value: object) -> object:
    """`value` if it is one line, else InputError: after a line break, the rest would run as a command of the script."""
    if not is_line(str(value)):
        raise InputError(
            f"{ascii(str(value))} cannot be written into a job script: it contains a line break or a control "
            "character; "
            "rename that folder or file"
        )
    return value
