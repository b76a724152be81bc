"""Makes a set shard by shard. A process that is killed loses only the shard that it is working on.

The cost of a shard does not depend on the number of shards: first the shard is written, then its record. The manifest
is written twice: before the first shard, and with all shards listed when the set is complete.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from distill.core import space
from distill.core.atomic import clear_up, remove_unfinished, write_atomic
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.runs.progress import Progress
from distill.shards import manifest as files
from distill.shards.manifest import E, M, SetKind, few
from distill.spec.layout import Layout, shard_record

B = TypeVar("B")  # what is made of one block


def make(
    kind: SetKind[M, E],
    planned: M,
    folder: Path,
    *,
    block: int,
    item_bytes: int,
    solve: Callable[[range], B],
    encode: Callable[[list[B], range], tuple[bytes, E]],
    progress: Progress,
    stop: StopRequest,
    part: tuple[int, int] | None = None,
    begin: Callable[[bool], None] = lambda is_new: None,
    check: Callable[[Mapping[str, E]], None] | None = None,
) -> M | None:
    """Make the shards of a set that `folder` does not have yet. Returns the manifest if this completed the set.

    On devices of the same kind, the files are the same bytes, whether or not the work was interrupted: blocks of
    consecutive items are always solved as a whole, and a shard appears complete or not at all.

    planned: the manifest, without shards. block: items that are solved together, of which shards hold a multiple. The
    last block of a shard may have fewer. item_bytes: about how much space an item takes. solve: makes the items of one
    block. encode: the bytes of a shard, from its blocks, and its entry.

    part: (i, n) makes only the shards i, i + n, ...; other processes make the rest. begin: called before the first
    shard is made, with whether this is part 0 and it has no shard yet. check: called with the records of all
    shards before the manifest of the complete set is written; it may raise.

    InputError if the folder holds another set or cannot be written.
    """
    make_folder(kind, folder)
    layout, ours = planned.layout, planned.layout.part(part)
    manifest = resume(kind, planned, folder, ours, progress, alone=part is None)
    missing = [number for number in ours if layout.name(number) not in manifest.shards]
    left = sum(len(layout.indices(number)) for number in missing)
    done, kept = layout.items(ours) - left, len(ours) - len(missing)
    space.require(folder, left * item_bytes, f"{left:,} {kind.items}")
    begin(done == 0 and bool(ours) and ours.start == 0)
    progress.start(done)
    listed, others = dict(manifest.shards), dict[str, E]()
    for already, number in enumerate(missing, start=kept):
        name, indices = layout.name(number), layout.indices(number)
        if kind.shared and (entry := _made_meanwhile(kind, folder, layout, name, others)) is not None:
            listed[name] = entry
            done += len(indices)
            progress.update(done, {})
            continue
        blocks: list[B] = []
        for start in range(indices.start, indices.stop, block):
            stop.raise_if_requested(f"{already} of {len(ours)} shards in {folder}")
            some = range(start, min(start + block, indices.stop))
            blocks.append(solve(some))
            done += len(some)
            progress.update(done, {})
        content, listed[name] = encode(blocks, indices)
        write_atomic(folder / name, content)
        write_atomic(shard_record(folder / name), listed[name].model_dump_json())
    if part is not None and (missing or len(listed) < layout.files):
        listed = listed | files.records(kind, folder, layout)[0]  # the part that ends last completes the set
    completed = None
    if len(listed) == layout.files and not manifest.done:
        if check is not None:
            check(listed | files.records(kind, folder, layout)[0])
        completed = manifest.with_shards(dict(sorted(listed.items())), done=True)
        completed.save(folder)
    if part is None:
        remove_records(folder, layout)
    return completed


def make_folder(kind: SetKind[M, E], folder: Path) -> None:
    """Make the folder of a set, unless it is there. InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{kind.items} cannot be written to {folder}: {error.strerror}; name another folder"
        ) from error


def _made_meanwhile(kind: SetKind[M, E], folder: Path, layout: Layout, name: str, others: dict[str, E]) -> E | None:
    """The entry of a shard that another run has made since this one began; None if there is no intact one.

    others: the entries of the set that another run has completed, once they were read.
    """
    path = folder / name
    if not path.exists():
        return None
    found = files.record(kind, shard_record(path), layout)[0]
    if found is None and not others and (manifest := files.read(kind, folder)) is not None:
        others.update(manifest.shards)
    found = found or others.get(name)
    return found if found is not None and files.fault(path, found) is None else None


def remove_records(folder: Path, layout: Layout) -> None:
    """Remove the records of the shards of a complete set, which its manifest lists."""
    for path in folder.glob("shard-*.json"):
        if layout.number(path.with_suffix(".safetensors").name) is not None:
            path.unlink(missing_ok=True)


def resume(kind: SetKind[M, E], planned: M, folder: Path, ours: range, progress: Progress, *, alone: bool) -> M:
    """The folder's manifest, with all shards that are complete. If there is none, the planned one is saved.

    The shards with numbers in `ours` are read and compared with their checksums; missing and damaged ones are left out.
    alone: no other process makes shards of the set, so unfinished files of any name are left over. InputError if the
    folder holds another set.
    """
    # Listed before the manifest is read, because another process may be creating both, or completing the set.
    recorded, unreadable = files.records(kind, folder, planned.layout)
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in kind.others)
    layout, found = planned.layout, files.read(kind, folder)
    strangers = files.foreign(kind, folder, layout) if found else shards
    if found and (differences := found.differences(planned)):
        raise InputError(
            f"{folder} contains {kind.items} with other settings: {', '.join(differences)}; delete the folder, or use "
            "another folder or run name"
        )
    if found is None and shards and all(layout.number(name) is not None for name in shards):
        raise InputError(
            f"{folder} contains shards, but no manifest.json, so they cannot be used; delete the folder and start again"
        )
    if strangers:
        raise InputError(f"{folder} contains shards that do not belong to this set: {few(strangers)}; remove them")
    if kind.shared:
        clear_up(folder)  # another run may be writing what this process is about to write
    else:
        remove_unfinished(folder, lambda name: alone or layout.number(f"{name.partition('.')[0]}.safetensors") in ours)
    if found is None:
        planned.save(folder)
        found = planned
    listed = {name: file for name, file in {**found.shards, **recorded}.items() if name not in unreadable}
    faults = dict[str, str]()
    for name in (layout.name(number) for number in ours):
        if name in unreadable:
            faults[name] = unreadable[name]
        elif name in listed and (wrong := files.fault(folder / name, listed[name])):
            faults[name] = f"{folder / name} is {wrong}"
    for wrong in faults.values():
        progress.warn(f"{wrong}; regenerating it")
    kept = {name: file for name, file in sorted(listed.items()) if name not in faults}
    resumed = found.with_shards(kept, done=False)
    return found if found.done and resumed.shards == found.shards else resumed
