"""A tracker of somebody else's package, as small as they get: a line for everything that it is told."""

from collections.abc import Mapping

from distill.trackers import TrackedMoment, TrackedRun

VIEW = "cat {folder}/lines"


def start(run: TrackedRun) -> "Lines":
    return Lines(run)


class Lines:
    def __init__(self, run: TrackedRun) -> None:
        self._file = (run.folder / "lines").open("w")
        self._write(f"{run.name} {run.spec['name']}")

    def metrics(self, at: TrackedMoment, values: Mapping[str, float]) -> None:
        self._write(f"{at.stage} {at.done} {at.unit}: {dict(values)}")

    def rewind(self, at: TrackedMoment) -> None:
        self._write(f"{at.stage} back to {at.done}")

    def note(self, at: TrackedMoment, text: str) -> None:
        self._write(f"{at.stage} {at.done} {at.unit}: {text}")

    def picture(self, at: TrackedMoment, name: str, png: bytes) -> None:
        self._write(f"{at.stage} {at.done} {at.unit}: {name}, {len(png)} bytes")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
