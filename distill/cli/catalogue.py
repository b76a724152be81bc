"""`distill init` and `distill recipes`: write a spec to start from, and list presets and recipes."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.common import JsonOption, one_line, print_json, print_table
from distill.core.atomic import write_atomic
from distill.core.collection import importing
from distill.core.errors import InputError, RunError
from distill.core.printing import say
from distill.core.space import human


def init(
    preset: Annotated[
        str | None,
        typer.Argument(help="Name of a preset, or with --teacher of a recipe; by default, list the presets."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Write a spec that distils this teacher by a recipe: a diffusers folder or hub id."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="With --teacher: number of GPUs to train on; by default 1.", min=1, max=100_000)
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="With --teacher: memory of a GPU in GB; by default 80.", min=1, max=100_000)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default PRESET.yaml.")] = None,
) -> None:
    """Write a spec to start from, every field with its description as a comment: of a preset, or for a teacher."""
    from distill.spec import presets, specfile

    if teacher is not None:
        _for_teacher(teacher, preset, out, gpus or 1, gpu_memory or 80.0)
        return
    without_effect = [name for name, value in {"--gpus": gpus, "--gpu-memory": gpu_memory}.items() if value is not None]
    if without_effect:
        raise InputError(f"{', '.join(without_effect)} has no effect without --teacher; leave it out")
    if preset is None:
        print_table(["preset", "what it makes"], [[name, presets.summary(name)] for name in presets.names()])
        say("write one with: distill init PRESET")
        return
    source = specfile.load(presets.find(preset))
    path = out or Path(f"{preset}.yaml")
    first, *others = presets.head(preset)
    of_file = first.replace(f" {preset}", f" {one_line(str(path))}", 1)
    _write(path, [of_file, *others], presets.annotated(source.spec, source.base, presets.notes(preset)))
    say(f"wrote {path}; edit it, then check it with: distill plan {path}")


def _for_teacher(teacher: str, recipe: str | None, out: Path | None, gpus: int, gpu_memory: float) -> None:
    """`distill init --teacher`: write the spec, and print what is still to do before it can run."""
    from distill.cli.inspect import checkpoint
    from distill.spec import presets, registry

    if recipe is None:
        raise InputError(f"--teacher {teacher}: name a recipe too; valid: {', '.join(registry.names())}")
    base = Path.cwd() if out is None else out.absolute().parent
    registry.source(recipe, base)  # raises if there is no such recipe
    given = checkpoint(teacher, None)
    with importing():
        from distill.execution import drafting, inspecting

    found = inspecting.inspect(given)
    request = drafting.DraftRequest(recipe, base, gpus, round(gpu_memory * 1e9))
    made = drafting.draft(given, found, request)
    path = out or Path(f"{made.spec.name}.yaml")
    count = f"{gpus} GPUs" if gpus > 1 else "one GPU"
    head = [
        f"{recipe} of a {found.network} with {found.parameters:,} parameters, on {count} of {gpu_memory:g} GB.",
        f"Weights, gradients, optimizer and averages take {human(made.bytes)} of each GPU, without activations.",
        *(f"To do: {each}" for each in made.to_do),
    ]
    lines = [
        line
        for each in head
        for line in textwrap.wrap(one_line(each), 116, break_long_words=False, break_on_hyphens=False)
    ]
    _write(path, [f"distill run {one_line(str(path))}", *lines], presets.annotated(made.spec, base))
    say(
        "\n".join(
            [
                f"wrote {path}; edit it, then check it with: distill plan {path}",
                *(f"to do: {each}" for each in made.to_do),
            ]
        )
    )


def _write(path: Path, head: Sequence[str], spec: str) -> None:
    """Write a new spec file, with the lines of the comment at its top. InputError if there is a file already."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; name another file with --out")
    lines = [f"# {line}".rstrip() for line in head]
    try:
        write_atomic(path, "\n".join([*lines, "", spec]))
    except RunError as error:
        raise InputError(str(error)) from None


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to show; by default, all are listed.")] = None,
    json: JsonOption = False,
) -> None:
    """List the recipes, or show what one needs, its options and the cost of a student update."""
    from distill.spec import registry, schema

    here = Path.cwd()
    if name is None:
        found = [registry.describe(each, here) for each in registry.names()]
        if json:
            print_json([{"name": d.name, "summary": d.summary, "needs": d.needs} for d in found])
        else:
            print_table(["recipe", "may need", "what it is"], [[d.name, ", ".join(d.needs), d.summary] for d in found])
            say("show one: distill recipes NAME")
        return
    module = registry.load(name, here)  # raises if the recipe cannot be imported
    described = registry.describe(name, here)
    if json:
        print_json(asdict(described) | {"sampler": module.Recipe.sampler})
        return
    say(f"{name}\n\n{described.paper}\n")
    cost = "not measured"
    if described.cost is not None:
        cost = f"{described.cost:g} x that of flow matching, measured on two CPU cores"
    say(f"may need, depending on its options: {', '.join(described.needs)}")
    say(f"sampler: {module.Recipe.sampler}\ncost of one student update: {cost}\n")
    fields = module.Config.model_json_schema()["properties"] if described.options else {}
    rows = [[o.name, schema.valid(fields[o.name]), _default(o.default), o.meaning] for o in described.options]
    print_table(["option", "valid", "default", "meaning"], rows)
    say(f"in a spec: stages: {{STAGE: {{kind: train, recipe: {name}, options: {{...}}}}}}")


def _default(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
