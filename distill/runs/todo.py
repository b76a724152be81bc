"""Loads the spec of a run and finds its unfinished stages."""

from pathlib import Path

from distill.core import records, yamltext
from distill.core.errors import InputError
from distill.runs.run_store import RunPaths
from distill.spec import layout
from distill.spec.model import RunSpec, TrainStage
from distill.spec.specfile import validate


def load_spec(run: RunPaths) -> RunSpec:
    """The spec of an existing run. InputError if it is missing or damaged."""
    try:
        text = records.read_small(run.spec).decode()
    except FileNotFoundError:
        raise InputError(f"{run.spec} is missing, so {run.root} cannot be read as a run") from None
    except UnicodeDecodeError:
        raise InputError(f"{run.spec}: not a text file (UTF-8); a spec is a YAML file") from None
    return validate(yamltext.parse(text, str(run.spec)), str(run.spec))


def pending(run: RunPaths, spec: RunSpec) -> list[str]:
    """The unfinished stages, in order. Finished pairs stages are included if `lost_pairs` finds them."""
    lost = lost_pairs(run, spec)
    return [name for name in spec.stages if name in lost or not run.stage(name).done.exists()]


def wanted_pairs(run: RunPaths, spec: RunSpec) -> set[str]:
    """The pairs stages that an unfinished stage trains on."""
    return {
        pairs
        for name, stage in spec.stages.items()
        if isinstance(stage, TrainStage) and not run.stage(name).done.exists()
        for pairs in stage.pair_shares
    }


def lost_pairs(run: RunPaths, spec: RunSpec) -> list[str]:
    """Finished pairs stages that are still needed but whose files are missing or truncated."""
    done = [name for name in wanted_pairs(run, spec) if run.stage(name).done.exists()]
    return sorted(name for name in done if not _are_whole(run.stage(name).pairs))


def _are_whole(folder: Path) -> bool:
    """Whether the manifest exists and each listed file has its size. Checksums are verified when pairs are read."""
    shards = layout.listed(folder)
    try:
        return shards is not None and all((folder / name).stat().st_size == size for name, size in shards.items())
    except OSError:
        return False
