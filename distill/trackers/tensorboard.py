"""TensorBoard: one folder of event files for each stage, in which steps are images, pairs, samples or network calls."""

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from distill.trackers import TrackedMoment, TrackedRun

VIEW = "tensorboard --logdir {folder}"


def start(run: TrackedRun) -> "TensorBoard":
    return TensorBoard(run.folder)


class TensorBoard:
    """Writes event files. torch is not needed for this."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, EventFileWriter] = {}

    def metrics(self, at: TrackedMoment, values: Mapping[str, float]) -> None:
        self._add(at, *(Summary.Value(tag=name, simple_value=value) for name, value in values.items()))

    def rewind(self, at: TrackedMoment) -> None:
        # TensorBoard removes what an earlier session of the same folder wrote for this step and later ones.
        log = SessionLog(status=SessionLog.START)
        self._writer(at.stage).add_event(Event(wall_time=at.time, step=at.done, session_log=log))

    def note(self, at: TrackedMoment, text: str) -> None:
        content = TensorProto(dtype="DT_STRING", string_val=[text.encode(errors="replace")])
        self._add(at, Summary.Value(tag="notes", metadata=create_summary_metadata("notes", ""), tensor=content))

    def picture(self, at: TrackedMoment, name: str, png: bytes) -> None:
        width, height = (int.from_bytes(png[begin : begin + 4], "big") for begin in (16, 20))  # of its first chunk
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        self._add(at, Summary.Value(tag=name, image=image))

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, at: TrackedMoment, *values: Summary.Value) -> None:
        self._writer(at.stage).add_event(Event(wall_time=at.time, step=at.done, summary=Summary(value=values)))

    def _writer(self, stage: str) -> EventFileWriter:
        if stage not in self._writers:
            self._writers[stage] = EventFileWriter(str(self._folder / stage))
        return self._writers[stage]
