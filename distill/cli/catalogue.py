"""`distill init` and `distill recipes`: write the spec of a preset, and list presets and recipes."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.common import JsonOption, one_line, print_json, print_table
from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.printing import say


def init(
    preset: Annotated[str | None, typer.Argument(help="Name of a preset; by default, list them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default PRESET.yaml.")] = None,
) -> None:
    """Write a spec to start from: every field of a preset, with its description as a comment."""
    from distill.spec import presets, specfile

    if preset is None:
        print_table(["preset", "what it makes"], [[name, " ".join(presets.head(name)[1:])] for name in presets.names()])
        say("write one with: distill init PRESET")
        return
    source = specfile.load(presets.find(preset))
    path = out or Path(f"{preset}.yaml")
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; name another file with --out")
    head = [f"# distill run {one_line(str(path))}", *(f"# {line}" for line in presets.head(preset)[1:])]
    text = "\n".join([*head, "", presets.annotated(source.spec, source.base)])
    try:
        write_atomic(path, text)
    except RunError as error:
        raise InputError(str(error)) from None
    say(f"wrote {path}; edit it, then check it with: distill plan {path}")


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
