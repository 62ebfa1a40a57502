"""A teacher beside a run of any kind: its probabilities as soft targets, its non-expert parameters to begin with.

What is learnt is `training.distillation`'s; data, judges and loop are those of the run that it is taught in.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.parallel import distributed, sharding
from switchmoe.planning import flops
from switchmoe.runs import teacher_store, trained
from switchmoe.runs.parts import Context, Judge, Parts, Start
from switchmoe.runs.reporting import METRICS_FILE, read_metrics
from switchmoe.runs.rundir import read_run
from switchmoe.settings import Settings
from switchmoe.training import distillation, places, train_state
from switchmoe.training.train_state import TrainState


class Teacher:
    """The model of `distill.teacher`, with the mesh, the batches and the lengths of its student.

    Raises:
      ValueError: none there, or one that the student can't learn from; one line.
    """

    def __init__(self, context: Context, lengths: dict[str, int]):
        student, self._mesh = context.settings, context.mesh
        self._source = trained.find(_named(context), "distill.teacher")
        before = self._source.settings
        same = {
            "model.stacks": lambda s: s.model.stacks,
            "model.vocab_rows": lambda s: s.embedding_rows,
            "data.bos_id": lambda s: s.data.bos_id,
            "data.eos_id": lambda s: s.data.eos_id,
        }
        for field, value in same.items():
            if value(before) != value(student):
                raise ValueError(
                    f"distill.teacher={student.distill.teacher}: {field} is {value(before)} there and {value(student)} here;"
                    " accepted is a teacher of the same pieces and stacks"
                )
        train = dataclasses.replace(before.train, accumulate=student.train.accumulate)
        self.settings = dataclasses.replace(before, data=student.data, mesh=student.mesh, train=train)
        sharding.check(self.settings, lengths, context.mesh.shape)
        self.step = int(self._source.step.name)
        distill = student.distill
        beside = distill.weight and not distill.top_k
        # Else they are read when they are needed, and leave the devices to the student in between.
        self.parameters: Callable[[], Any] = functools.cache(self._parameters) if beside else self._parameters

    @property
    def name(self) -> str:
        return str(self._source.step)

    def _parameters(self) -> Any:
        return trained.parameters(self._source, self.settings, self._mesh)

    def check_vocabulary(self, sha256: str) -> None:
        """Raises ValueError: its vocabulary is another."""
        found = self._source.vocabulary
        if found and found.sha256 != sha256:
            raise ValueError(
                f"distill.teacher={self.name}: its vocabulary is another than the run's; accepted is the same (leave data.vocab and"
                " init.checkpoint out to have the teacher's)"
            )

    def begins(self, student: Settings, note: Callable[[str], None]) -> Start:
        """The teacher's parameters, layer by layer, in all of the student's that it has in the same shape.

        Raises:
          ValueError: there are none.
        """
        pairs = _shared(self.settings, student)
        if not pairs:
            raise ValueError(
                f"distill.init=True: no parameter of distill.teacher={student.distill.teacher} has the shape of the student's;"
                " accepted is False"
            )
        ours = places.names(student)
        note(f"parameters from the teacher: in {len(pairs)} of {len(ours)} arrays of the student")

        def fill(fresh: dict[str, jax.Array], there: dict[str, jax.Array]) -> dict[str, jax.Array]:
            for name, found in pairs.items():
                for own, other, origin in found:
                    fresh[name] = fresh[name].at[own].set(there[origin][other].astype(fresh[name].dtype))
            return fresh

        def load(state: TrainState) -> TrainState:
            fresh = flatten_dict(state.params, sep="/")
            where = {name: leaf.sharding for name, leaf in fresh.items()}
            there = flatten_dict(self.parameters(), sep="/")
            filled = jax.jit(fill, out_shardings=where)(fresh, there)
            return state.replace(params=unflatten_dict(filled, sep="/"))

        return Start(load, {"checkpoint": student.distill.teacher, "step": self.step, "arrays": len(pairs)})


def _named(context: Context) -> str:
    """`distill.teacher`, of a run that has begun with the step that it began with."""
    text = context.settings.distill.teacher
    step = (read_run(context.workdir).get("init") or {}).get("teacher_step") if context.begun else None
    return text if step is None or "|" in text or Path(text).name == str(step) else f"{text}|{step}"


def _shared(teacher: Settings, student: Settings) -> dict[str, list[tuple[tuple, tuple, str]]]:
    """Of the student's parameters what the teacher has: (place in the array, place in the teacher's, the teacher's name)."""
    there = {
        (key, number): (index, name, shape[len(index) :])
        for name, shape in places.names(teacher).items()
        for key, number, index in places.places(teacher, name)
    }
    found: dict[str, list] = {}
    for name, shape in places.names(student).items():
        for key, number, index in places.places(student, name):
            other, origin, size = there.get((key, number), ((), "", None))
            if size == shape[len(index) :]:
                found.setdefault(name, []).append((index, other, origin))
    return found


def taught(parts: Parts, context: Context, lengths: dict[str, int], vocabulary_sha256: str) -> Parts:
    """The parts with the teacher of `distill.teacher`, or as they are where there is none.

    Raises:
      ValueError: a teacher or a baseline that can't be used.
    """
    settings = context.settings
    distill = settings.distill
    if not distill.teacher:
        return parts
    teacher = Teacher(context, lengths)
    teacher.check_vocabulary(vocabulary_sha256)
    judge = next(one for one in parts.judges if one.name == parts.best[0])
    baseline = _baseline(settings, parts)
    if not context.begun:
        start = teacher.begins(settings, context.note) if distill.init else parts.start
        record = (start.record or {}) | {"teacher": distill.teacher, "teacher_step": teacher.step}
        parts = parts._replace(start=Start(start.load, record))
    work = flops.train_flops(settings, lengths)  # with the logits of all tokens
    if distill.weight and distill.top_k:
        data = teacher_store.Kept(parts.data, context, teacher.name, teacher.settings, teacher.parameters)
        parts = parts._replace(data=data, objective=distillation.kept(), flops=work)
    elif distill.weight:
        forward = settings.data.batch_size * sum(flops.forward_flops(teacher.settings, lengths).values())
        parts = parts._replace(
            objective=distillation.beside(teacher.settings, teacher.parameters), flops=work + forward
        )

    def finish(params: Any) -> dict[str, Any]:
        found = parts.finish(params)
        try:
            return found | {"distilled": _gain(context, teacher, judge, parts.best, baseline)}
        except (ValueError, OSError) as error:  # the step may be gone, of a teacher that was trained on
            context.note(f"warning: what is kept of the teacher is not told: {error}")
            return found

    return parts._replace(finish=finish)


def _baseline(settings: Settings, parts: Parts) -> float | None:
    """The last figure of the run of `distill.baseline`, None without one."""
    text = settings.distill.baseline
    if not text:
        return None
    directory = Path(text).expanduser()
    judge, figure = parts.best
    known = read_run(directory).get("documents_sha256")
    if not known:
        raise ValueError(f"distill.baseline={text}: no run; accepted is the directory of a finished one")
    differ = sorted(name for name, value in known.items() if parts.data.identity.get(name, value) != value)
    if differ:
        raise ValueError(
            f"distill.baseline={text}: its text ({', '.join(differ)}) is another; accepted is a run that was judged on the same"
        )
    return _last(directory, judge, figure)


def _last(directory: Path, judge: str, figure: str) -> float:
    """A figure at a run's last evaluation.

    Raises:
      ValueError: there is none.
    """
    found = [record for record in read_metrics(directory / METRICS_FILE) if record["split"] == judge]
    if not found or figure not in found[-1]:
        raise ValueError(f"{directory}: no {figure} of {judge}; accepted is a run that was judged by it")
    return found[-1][figure]


def _gain(
    context: Context,
    teacher: Teacher,
    judge: Judge,
    best: tuple[str, str],
    baseline: float | None,
) -> dict[str, Any]:
    """What the student kept of the teacher: ``judge``'s figure of both, parameters of both, and of a baseline.

    ``gain_kept`` = (baseline - student) / (baseline - teacher), of which the paper has 0.27 to 0.37; ``compression``: the share of
    the teacher's parameters that the student lacks.
    """
    name, figure = best
    of_teacher = judge.of(teacher.settings)
    parameters = teacher.parameters()
    of_teacher.compile(parameters)
    there = float(of_teacher.figures(parameters)[figure])
    counts = [train_state.parameter_counts(s)[0] for s in (teacher.settings, context.settings)]
    found: dict[str, Any] = {
        "teacher": context.settings.distill.teacher,
        "figure": f"{name}/{figure}",
        "of_teacher": there,
        "of_student": _last(context.workdir, name, figure) if distributed.is_main() else None,
        "parameters_of_teacher": counts[0],
        "parameters_of_student": counts[1],
        "compression": 1 - counts[1] / counts[0],
    }
    if baseline is not None and distributed.is_main():
        gain = baseline - there
        found["of_baseline"] = baseline
        found["gain_kept"] = (baseline - found["of_student"]) / gain if gain else None
    return found
