"""Who is in which slot: a queue, admission between steps, and the thread that computes.

A job is a prompt and its answers, of which each takes a slot. What becomes of it is told to ``job.tell``, in the engine's thread:
`Opened`, then of each answer `Token` after `Token` and `Ended`; or `Failed`, and nothing more. Nobody waits for who listens.
"""

import collections
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchmoe.inference.serving.programs import Controls, Prefilled, Programs, Scores, Stepped

ADMITTED = 4  # prompts read between two steps, at most: those who are answered wait for them

STOP, LENGTH = "stop", "length"  # why an answer ended
LATE, BROKEN, CLOSED = "late", "broken", "closed"  # why a job failed


class Refused(Exception):
    """A job that can't be taken: ``why`` is full, warming, closed or failed."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


class Opened(NamedTuple):
    """The prompt was read."""

    scores: Scores | None  # if asked for
    expert_LPK: np.ndarray | None  # if asked for


class Token(NamedTuple):
    answer: int
    token: int
    log_prob: float
    best: list[tuple[int, float]]  # as many as asked for, best first
    expert_LK: np.ndarray | None  # if asked for


class Ended(NamedTuple):
    answer: int
    why: str  # STOP | LENGTH


class Failed(NamedTuple):
    why: str  # LATE | BROKEN | CLOSED


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt, and what is to come of it. Token ids as the model reads them: `generation.prompt_ids`."""

    ids: Sequence[int]
    max_tokens: int
    tell: Callable[[Any], None]
    answers: int = 1
    seed: int = 0
    number: int = 0  # of the first answer; the others' follow. With the seed it says what is drawn
    temperature: float = 0.0  # 0: the likeliest
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: frozenset[int] = frozenset((1,))
    ends: Sequence[
        Callable[[int], bool]
    ] = ()  # of each answer: takes a token, says whether the answer ends with it
    best: int = 0  # alternatives of each token
    scores: bool = False  # of the prompt
    experts: bool = False
    deadline: float = float("inf")  # of time.monotonic()
    # What became of it, times of time.monotonic().
    arrived: float = 0.0
    started: float = 0.0
    first: float = 0.0  # when its first token came
    tokens: int = 0
    open: int = 0  # answers that have not ended
    cancelled: bool = False
    prefilled: Prefilled | None = None


@dataclasses.dataclass(eq=False)
class _Slot:
    job: Job
    answer: int
    count: int = 0
    last: float = 0.0  # when its newest token came, of time.monotonic()


class Watcher:
    """What an engine tells of its work, in its thread: for metrics."""

    def opened(self, job: Job, expert_LPK: np.ndarray | None) -> None: ...

    def stepped(self, rows: int, expert_LBK: np.ndarray | None) -> None: ...

    def waited(self, seconds: float) -> None:
        """From an answer's token to its next one, with what was done between two steps."""

    def ended(self, job: Job, why: str) -> None:
        """An answer, or (LATE, BROKEN, CLOSED, ``cancelled``) the whole job."""


class Engine:
    """Computes in a thread of its own, from ``start`` to ``stop``.

    Args:
      queue: answers that may wait for a slot.
      note: what is told once in a while: that it warms up, that a step failed.
    """

    def __init__(
        self,
        programs: Programs,
        queue: int,
        watcher: Watcher | None = None,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.programs, self.queue = programs, queue
        self._watcher, self._note = watcher or Watcher(), note
        self._slots: list[_Slot | None] = [None] * programs.slots
        self._waiting: collections.deque[_Slot] = collections.deque()
        self._changed = threading.Condition()
        self._closed, self._cut, self._failed = False, False, ""
        self.ready = False
        self.failing: Callable[[Exception], None] = lambda error: None  # told why it could not be warmed up
        self._controls = Controls.empty(programs.slots)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> int:
        return sum(slot is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closed

    @property
    def failed(self) -> str:
        """Why it could not be warmed up, or ended by itself; empty: it did not."""
        return self._failed

    def start(self) -> None:
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Takes all of the jobs or none. Raises `Refused`."""
        for job in jobs:
            job.arrived, job.open = time.monotonic(), job.answers
        with self._changed:
            if self._closed:
                raise Refused("closed")
            if self._failed:
                raise Refused("failed")
            if not self.ready:
                raise Refused("warming")
            asked = [_Slot(job, answer) for job in jobs for answer in range(job.answers)]
            free = self.queue + self.programs.slots - self.running
            if len(self._waiting) + len(asked) > free:
                raise Refused("full")
            self._waiting.extend(asked)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: its slots are free before the next step."""
        job.cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Takes no more jobs, and ends when those that it has are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def stop(self, seconds: float | None = None) -> bool:
        """`close`, and waits; what is not done after so many seconds fails. Returns whether all was done."""
        self.close()
        if self._thread.ident is None:
            return True
        self._thread.join(seconds)
        # While it compiles nobody waits.
        done = not self._thread.is_alive() or not (self.running or self.waiting)
        self._cut = True
        self._thread.join(seconds)
        return done

    def _run(self) -> None:
        try:
            for what in self.programs.warm():
                self._note(f"compiling {what}")
                if self._closed:
                    return
        except Exception as error:
            self._died(error)
            self._note(f"the programs can't be compiled: {self._failed}")
            self.failing(error)
            return
        self.ready = True
        try:
            self._note("ready")
            self._serve()
        except Exception as error:
            self._died(error)
            self._note(f"the engine ended: {self._failed}")

    def _died(self, error: Exception) -> None:
        """Nothing is computed any more: all who wait are told, and who comes is refused."""
        with self._changed:
            self._failed, self.ready = f"{type(error).__name__}: {error}".splitlines()[0], False
        for job in _jobs((*self._slots, *self._waiting)):
            self._remove(job)
            for tell in (
                functools.partial(job.tell, Failed(BROKEN)),
                functools.partial(self._watcher.ended, job, BROKEN),
            ):
                with contextlib.suppress(Exception):  # of who listens, so that the others are told
                    tell()

    def _serve(self) -> None:
        while self._wait():
            try:
                self._sweep()
                self._admit()
                self._step()
            except Exception as error:  # of the device: memory, most likely
                self._note(f"a step failed: {type(error).__name__}: {error}".splitlines()[0])
                for job in _jobs(self._slots):
                    self._fail(job, BROKEN)
                self.programs.reset()

    def _wait(self) -> bool:
        """Until there is work; False: there will be none."""
        with self._changed:
            while not (self._waiting or self.running):
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _sweep(self) -> None:
        """Ends what nobody waits for, and what is late."""
        now = time.monotonic()
        for job in _jobs((*self._slots, *list(self._waiting))):
            if job.cancelled:
                self._remove(job)
                self._watcher.ended(job, "cancelled")
            elif self._cut:
                self._fail(job, CLOSED)
            elif now > job.deadline:
                self._fail(job, LATE)

    def _remove(self, job: Job) -> None:
        for place, slot in enumerate(self._slots):
            if slot and slot.job is job:
                self._free(place)
        job.prefilled = None
        with self._changed:
            self._waiting = collections.deque(slot for slot in self._waiting if slot.job is not job)

    def _fail(self, job: Job, why: str) -> None:
        self._remove(job)
        self._watcher.ended(job, why)
        job.tell(Failed(why))

    def _free(self, place: int) -> None:
        self._slots[place] = None
        self._controls.position_B[place] = -1
        self._controls.temperature_B[place] = 0.0

    def _admit(self) -> None:
        read = 0
        for place in range(len(self._slots)):
            if self._slots[place] or not self._waiting:
                continue
            job = self._waiting[0].job
            if job.prefilled is None:
                if read == ADMITTED:
                    return
                read += 1
                try:
                    self._open(job)
                except Exception as error:
                    self._fail(job, BROKEN)
                    if not isinstance(error, OSError):
                        raise
                    self._note(f"a prompt failed: {error}".splitlines()[0])  # its experts are its own
                    continue
            with self._changed:
                slot = self._waiting.popleft()
            if job.max_tokens:
                self._place(slot, place)
            if slot.answer == job.answers - 1:
                job.prefilled = None  # its memory is of no more use
            if not job.max_tokens:
                self._end(slot, LENGTH)

    def _open(self, job: Job) -> None:
        job.started = time.monotonic()
        job.prefilled = found = self.programs.prefill(job.ids)
        expert_LPK = None if found.expert_LPK is None else np.asarray(found.expert_LPK)[:, : found.count]
        self._watcher.opened(job, expert_LPK)
        scores = self.programs.scores(found) if job.scores else None
        job.tell(Opened(scores, expert_LPK if job.experts else None))

    def _place(self, slot: _Slot, place: int) -> None:
        job, controls = slot.job, self._controls
        self._slots[place] = slot  # so that it is told if this fails
        self.programs.insert(job.prefilled, place)
        controls.position_B[place] = self.programs.first_position(job.prefilled)
        controls.count_B[place] = 0
        controls.key_BN[place] = self.programs.key(job.seed, job.number + slot.answer)
        controls.temperature_B[place], controls.top_k_B[place], controls.top_p_B[place] = (
            job.temperature,
            job.top_k,
            job.top_p,
        )

    def _step(self) -> None:
        if not self.running:
            return
        tells = np.array(any(slot.job.best for slot in self._slots if slot))
        found = self.programs.step(self._controls._replace(tells=tells))
        now = time.monotonic()
        used = [place for place, slot in enumerate(self._slots) if slot]
        expert_LBK = None if found.expert_LBK is None else found.expert_LBK[:, used]
        self._watcher.stepped(len(used), expert_LBK)
        for place in used:
            slot = self._slots[place]
            if not slot.job.cancelled:
                self._hand_out(place, slot, found, now)

    def _hand_out(self, place: int, slot: _Slot, found: Stepped, now: float) -> None:
        job, token = slot.job, int(found.token_B[place])
        if slot.count:
            self._watcher.waited(now - slot.last)
        slot.count, slot.last = slot.count + 1, now
        job.tokens += 1
        job.first = job.first or now
        best = [
            (int(found.best_BT[place, n]), float(found.best_log_prob_BT[place, n])) for n in range(job.best)
        ]
        experts = found.expert_LBK[:, place] if job.experts and found.expert_LBK is not None else None
        stopped = token in job.stop_ids
        if job.ends:
            stopped = job.ends[slot.answer](token) or stopped
        job.tell(Token(slot.answer, token, float(found.log_prob_B[place]), best, experts))
        if stopped or slot.count == job.max_tokens:
            self._free(place)
            self._end(slot, STOP if stopped else LENGTH)
            return
        self._controls.position_B[place] += 1
        self._controls.count_B[place] += 1

    def _end(self, slot: _Slot, why: str) -> None:
        slot.job.open -= 1
        self._watcher.ended(slot.job, why)
        slot.job.tell(Ended(slot.answer, why))


def _jobs(slots: Iterable[_Slot | None]) -> list[Job]:
    return list(dict.fromkeys(slot.job for slot in slots if slot))
