"""`distill inspect` and `distill teachers`: what is known of a teacher, and which teachers are supported."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import JsonOption, StoreOption, TeacherHelp, print_json, print_table, store_path
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human

if TYPE_CHECKING:
    import distill.execution.inspecting
    import distill.spec.model


def inspect(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=TeacherHelp)],
    size: Annotated[
        str | None,
        typer.Option(help="Size of the samples in pixels, as 512,768 (height, width) or 81,480,832 (frames first)."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show what the files of a teacher say about it, without loading its weights, and what a spec has to set."""
    spec = checkpoint(teacher, store, size)
    with importing():
        from distill.execution import inspecting

    found = inspecting.inspect(spec)
    if json:
        print_json(asdict(found) | {"sizes": None, "parameters": found.parameters})
        return
    print_table(["", "found"], _rows(found))
    if found.to_set:
        say("to set in the spec:")
        say("\n".join(f"  teacher.{name}: {why}" for name, why in found.to_set.items()))
    else:
        say(f"use it in a spec: teacher: {{path: {teacher}}}")


def teachers(json: JsonOption = False) -> None:
    """List the supported teachers: networks and pipelines of diffusers, and how they are conditioned and guided."""
    with importing():
        from distill.teachers import overview

    found = overview.supported()
    if json:
        print_json([asdict(each) for each in found])
    else:
        print_table(overview.HEADERS, [each.cells for each in found])


def checkpoint(teacher: str, store: str | None, size: str | None = None) -> "distill.spec.model.CheckpointTeacher":
    """A teacher that has files. size: the value of --size."""
    from distill.cli import arguments
    from distill.spec.model import CheckpointTeacher

    spec = arguments.teacher(teacher, store_path(store))
    if not isinstance(spec, CheckpointTeacher):
        raise InputError(f"a {spec.kind} teacher is known in closed form and has no files; give a checkpoint's folder")
    if size is None:
        return spec
    sides = arguments.numbers("--size", size)
    if len(sides) not in (2, 3) or not all(1 <= side <= 16384 for side in sides):
        raise InputError(f"--size {size}: give height,width or frames,height,width, from 1 to 16,384")
    return spec.model_copy(update={"size": sides})


def _rows(found: "distill.execution.inspecting.InspectedTeacher") -> list[list[str]]:
    rows = [["network", found.network], ["pipeline", found.pipeline or "none: a single model folder"]]
    for each in found.networks:
        stored = ", ".join(f"{name} ({count:,} tensors)" for name, count in each.dtypes.items()) or "not downloaded"
        rows.append(
            [
                "weights" if each.folder == "." else f"weights in {each.folder}",
                f"{each.parameters:,} parameters; stored: {stored}",
            ]
        )
    rows += [["prediction", found.prediction or "not known"], ["schedule", _schedule(found)]]
    if found.t_range is not None:
        rows.append(["times (linear path)", f"{found.t_range[0]:.4g} (data) to {found.t_range[1]:.6g} (noise)"])
    rows.append(["sample", _by(found.shape)])
    if found.size:
        rows.append(["size in pixels", _by(found.size) + (" (teacher.size sets another)" if found.takes_size else "")])
    if (autoencoder := found.autoencoder) is not None:
        temporal, spatial = autoencoder.factors
        rows.append(["autoencoder", f"{autoencoder.name}: 1/{spatial} of each side, 1/{temporal} of the frames"])
    rows.append(["conditions", _conditions(found)])
    if found.text_encoders:
        rows.append(["text encoders", _pairs(found.text_encoders)])
    rows += [["guidance", found.guidance.words], ["licence", found.license or "not stated"]]
    rows += [[f"memory: {what}", human(count)] for what, count in found.memory.items()]
    rows[-1][1] += ", with gradients, AdamW and one average (EMA), without activations"
    return rows


def _schedule(found: "distill.execution.inspecting.InspectedTeacher") -> str:
    if (schedule := found.schedule) is None:
        return "linear path" if found.t_range is not None else "not known"
    options = ", ".join(f"{name} {_value(value)}" for name, value in schedule.options.items())
    return f"{schedule.family} ({schedule.scheduler}): {options}"


def _conditions(found: "distill.execution.inspecting.InspectedTeacher") -> str:
    if found.classes is not None:
        return f"class labels: {found.classes:,} classes"
    fields = {name: f"[{', '.join('any' if n is None else str(n) for n in s)}]" for name, s in found.conditions.items()}
    return _pairs(fields) or "none"


def _pairs(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
