"""A run's TensorBoard files. Apart from `reporting`, as tensorboardX loads torch wherever that is installed: 460 MB and seconds."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """A new event file in a directory. Written here and now: tensorboardX's own SummaryWriter queues events for a
    thread, which loses them in a kill and blocks for ever after a full disk.

    Args:
      resume_step: TensorBoard forgets the steps after it.
    """

    def __init__(self, directory: Path, resume_step: int | None):
        directory.mkdir(exist_ok=True)
        # The writer's names change once a second: the count keeps a quick restart from overwriting.
        number = len(list(directory.iterdir()))
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{number:04d}")
        if resume_step is not None:
            # It forgets this step, too.
            self._write(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=summary)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()
