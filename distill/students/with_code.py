"""Complete pipelines that need code of their own, where the stock classes of diffusers cannot sample a student.

See `exchange.own_code` for what the code is. It is written only into complete pipelines, and is checked there like all
other files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from distill.exchange import own_code
from distill.networks.two_times import TwoNetworks, TwoTimes
from distill.students import native, shipped, stock
from distill.students.native import NativeStudent
from distill.students.stock import Stock
from distill.teachers import layout
from distill.teachers.loaded import Packaging
from distill.teachers.read import parse

SAMPLERS = ("euler", "jump")  # whose steps are x_s = x_t + (s - t) v, as the schedulers compute them


def of(student: NativeStudent, sampler: str, t_grids: Mapping[int, Sequence[float]], packaging: Packaging) -> Stock:
    """How a pipeline with code of its own samples a student that the stock pipeline cannot sample."""
    if isinstance(student.network, TwoNetworks) or sampler not in SAMPLERS:
        return stock.of(student, sampler, t_grids, packaging)
    call = native.call_of(student)
    convention, config = native.convention_for(native.base_of(student.network)), stock.config_of(student)
    steps, arguments = tuple(sorted(t_grids)) or None, stock.arguments(convention, config, packaging, whole=True)
    if isinstance(student.network, TwoTimes) and (found := stock.flow_map(call, convention, t_grids)) is not None:
        return Stock(found, steps, arguments)
    scheduler: dict[str, object] = {
        "_class_name": own_code.SCHEDULER[1],
        "num_train_timesteps": int(call.time_scale),
        "prediction": call.prediction,
        "inverted": call.inverted,
        "before_shift": convention.passes == "timesteps",
        "t_grids": {str(steps): list(times) for steps, times in sorted(t_grids.items())} or None,
        "teacher": dict(packaging.scheduler),
    }
    if call.table is not None:
        scheduler |= {"log_sigmas": call.table.tolist(), "num_train_timesteps": len(call.table)}
    if call.edm is not None:
        scheduler["edm"] = list(call.edm)
    return Stock(scheduler, steps, arguments)


def is_needed(how: Stock, network: nn.Module) -> bool:
    """Whether this way to sample a student with this network needs code."""
    return how.works and (has_scheduler(how) or isinstance(network, TwoTimes))


def has_scheduler(how: Stock) -> bool:
    """Whether the scheduler is ours, and not one of diffusers."""
    return how.scheduler.get("_class_name") == own_code.SCHEDULER[1]


def write(folder: Path, network: nn.Module, how: Stock) -> None:
    """Adds the code to a folder with a student's scheduler and model_index.json, and names it there."""
    path = folder / layout.INDEX
    index = parse(path)
    if has_scheduler(how):
        index["scheduler"] = list(own_code.SCHEDULER)
        (folder / "scheduler" / f"{own_code.SCHEDULER[0]}.py").write_text(shipped.scheduler())
    if isinstance(network, TwoTimes):
        index["_class_name"] = [own_code.PIPELINE, own_code.FLOW_MAP + own_code.stock_class(index["_class_name"])]
        index["second_time"] = list(own_code.SECOND_TIME)
        (folder / f"{own_code.PIPELINE}.py").write_text(shipped.flow_map_pipeline())
        (folder / "second_time" / f"{own_code.SECOND_TIME[0]}.py").write_text(shipped.second_time())
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
