"""The engine of a server: answers are `Generator`'s, whoever is beside; slots are freed; a queue has an end. No HTTP."""

import dataclasses
import functools
import gc
import random
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import init, settings, teacher_forced

from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.inference.serving import programs as serving
from switchmoe.inference.serving.engine import (
    CLOSED,
    LATE,
    Ended,
    Engine,
    Failed,
    Job,
    Opened,
    Refused,
    Token,
)
from switchmoe.inference.serving.programs import Programs
from switchmoe.model.transformer import Transformer, without_limits

SLOTS, MAX_PROMPT, MAX_TOKENS = 4, 24, 12
KINDS = {
    "switch": settings(),
    "decoder": settings("decoder_only"),
    "two_of_four": settings("decoder_only", "top_k"),
    "many_experts": settings(num_experts=20),
}


@functools.cache
def warmed(kind):
    made = Programs(KINDS[kind], init(KINDS[kind]), SLOTS, MAX_PROMPT, MAX_TOKENS)
    list(made.warm())
    return made


class Listener:
    """What a job was told."""

    def __init__(self):
        self.events, self.done = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        ended = sum(isinstance(event, Ended) for event in self.events)
        if isinstance(event, Failed) or ended == self.answers:
            self.done.set()

    answers = 1

    def of(self, answer=0):
        assert self.done.wait(120)
        return [event for event in self.events if isinstance(event, Token) and event.answer == answer]


def job(ids, tokens=6, **options):
    listener = Listener()
    listener.answers = options.get("answers", 1)
    made = Job(ids, tokens, listener, **{"stop_ids": frozenset()} | options)
    made.listener = listener
    return made


@pytest.fixture
def engine(request):
    made = []

    def start(kind, queue=64, watcher=None):
        made.append(Engine(warmed(kind), queue, watcher))
        made[-1].start()
        while not made[-1].ready:
            assert not made[-1].failed, made[-1].failed
            time.sleep(0.005)
        return made[-1]

    yield start
    for one in made:
        one.stop(10)


def asked(kind, count, seed=0):
    """Prompts of unequal lengths, greedy and drawn, with all there is to ask for."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        ids = [0, *(rng.randrange(2, 300) for _ in range(rng.randrange(1, MAX_PROMPT - 1)))]
        drawn = dict(temperature=1.5, top_k=rng.choice([0, 5]), top_p=rng.choice([1.0, 0.9])) if n % 2 else {}
        found.append(
            dict(ids=ids, tokens=rng.randrange(1, MAX_TOKENS), seed=n, best=rng.choice([0, 3]), **drawn)
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_bits_whoever_is_beside(engine, kind):
    """Each alone, then all under a load in which requests join and leave at random."""
    running, requests, alone = engine(kind), asked(kind, 14), []
    for request in requests:
        one = job(**request, experts=True)
        running.submit(one)
        alone.append(one.listener.of())
    rng, jobs = random.Random(1), []
    for request in rng.sample(requests, len(requests)):
        one = job(**request, experts=True)
        running.submit(one)
        jobs.append((requests.index(request), one))
        noise = job(
            [0, *(rng.randrange(2, 300) for _ in range(9))],
            rng.randrange(1, 9),
            temperature=1.0,
            seed=rng.randrange(99),
        )
        running.submit(noise)
        if rng.random() < 0.3:
            running.cancel(noise)
        time.sleep(rng.random() * 0.01)
    for number, one in jobs:
        for found, wanted in zip(one.listener.of(), alone[number], strict=True):
            assert found[:4] == wanted[:4]  # token, log-probability and alternatives, bit by bit
            np.testing.assert_array_equal(found.expert_LK, wanted.expert_LK)


@pytest.mark.parametrize("kind", ["switch", "decoder", "two_of_four"])
@pytest.mark.parametrize("how", [{}, dict(temperature=1.5, top_k=9, top_p=0.8)], ids=["greedy", "drawn"])
def test_tokens_are_those_of_the_generator(engine, kind, how):
    of, running = KINDS[kind], engine(kind)
    prompts = [[0, *range(5, 5 + n)] for n in (3, 17, 8)]
    generator = Generator(of, init(of), 7, Choosing(stop_ids=(), **how), seed=3)
    wanted = [answer.ids for answer in generator(prompts)]
    jobs = [job(ids, 7, seed=3, number=n, **how) for n, ids in enumerate(prompts)]
    running.submit(*jobs)
    assert [[event.token for event in one.listener.of()] for one in jobs] == wanted
    # Several answers to a prompt are the generator's to as many prompts.
    wanted = [answer.ids for answer in generator([prompts[0]] * 3)]
    one = job(prompts[0], 7, seed=3, answers=3, **how)
    running.submit(one)
    assert [[event.token for event in one.listener.of(n)] for n in range(3)] == wanted


@pytest.mark.parametrize("kind", ["decoder", "switch"])
def test_nothing_is_compiled_once_it_is_ready(engine, kind):
    running = engine(kind)
    made = running.programs
    programs = made._prefill, made._insert, made._step, made._score, made._key
    before = [program._cache_size() for program in programs]
    jobs = [job(**request, scores=not made.encodes, experts=True) for request in asked(kind, 6)]
    running.submit(*jobs)
    for one in jobs:
        one.listener.of()
    assert [program._cache_size() for program in programs] == before
    assert before[0] == len(made.lengths) and before[3] == (0 if made.encodes else before[0])


@pytest.mark.parametrize("kind", ["two_of_four", "switch"])
def test_experts_are_those_that_the_whole_model_chooses(engine, kind):
    """`routed_experts` of the prompt and of each new token, against teacher forcing."""
    of, running = KINDS[kind], engine(kind)
    ids = [0 if of.stacks == ("decoder",) else 5, 9, 41, 7, 250, 3]
    one = job(ids, 11, experts=True, temperature=3.0, seed=3)
    running.submit(one)
    found = one.listener.of()
    tokens = [event.token for event in found]
    model = Transformer(dataclasses.replace(of, moe=without_limits(of.moe)), trace=True)
    encodes = running.programs.encodes
    read = (
        (jnp.array([ids]), jnp.array([[*tokens, 0]]))
        if encodes
        else (None, jnp.array([[*ids[1:], *tokens, 0]]))
    )
    aux = jax.jit(model.apply)({"params": init(of)}, *read)[1]
    chosen = {stack: np.asarray(aux[stack]["trace"]["expert"])[:, 0] for stack in of.stacks}
    own_LNK = np.stack([event.expert_LK for event in found], axis=1)
    of_prompt_LPK = np.asarray(one.listener.events[0].expert_LPK)[:, : len(ids)]
    np.testing.assert_array_equal(own_LNK, chosen["decoder"][:, 1 if encodes else len(ids) :])
    np.testing.assert_array_equal(of_prompt_LPK, chosen[of.stacks[0]][:, : len(ids)])
    assert len(set(tokens)) > 3 and len(np.unique(own_LNK)) > 1


def test_a_slots_encoder_keys_and_values_are_the_prefilled_ones_after_a_step():
    made = warmed("switch")
    made.reset()
    controls = serving.Controls.empty(SLOTS)
    prefilled = made.prefill([9, 7, 8, 1])
    controls.position_B[2] = made.first_position(prefilled)
    made.insert(prefilled, 2)
    made.step(controls)
    blocks = zip(made._state.memory.blocks, prefilled.state.memory.blocks, strict=True)
    pairs = [pair for mine, theirs in blocks for pair in zip(mine["cross"], theirs["cross"], strict=True)]
    assert len(pairs) == 2 * KINDS["switch"].layers("decoder")
    for mine, theirs in pairs:
        np.testing.assert_array_equal(mine[2], theirs[0])
        assert np.any(np.asarray(theirs)) and not np.any(np.asarray(mine[0]))
    made.reset()


def test_scores_of_a_prompt_are_teacher_forcings(engine):
    of, running = KINDS["decoder"], engine("decoder")
    ids = [0, 9, 41, 7, 250, 3]
    one = job(ids, 0, scores=True, experts=True)
    running.submit(one)
    assert one.listener.of() == [] and isinstance(one.listener.events[-1], Ended)
    opened = one.listener.events[0]
    assert isinstance(opened, Opened)
    log_prob_NV = teacher_forced(of, jnp.array([ids[:1]]), jnp.array([1]), jnp.array([ids[1:]]))[0]
    wanted = [log_prob_NV[n, token] for n, token in enumerate(ids[1:])]
    np.testing.assert_allclose(opened.scores.log_prob_P, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(opened.scores.best_PT[:, 0], log_prob_NV.argmax(-1))
    layers, choices = len(running.programs.layers), of.moe.total_choices
    assert opened.expert_LPK.shape == (layers, len(ids), choices)
    assert (opened.expert_LPK >= 0).all()


def test_an_answer_ends_with_a_stop_token_or_when_it_is_told_to(engine):
    running = engine("decoder")
    free = job([0, 5, 9], 8)
    running.submit(free)
    tokens = [event.token for event in free.listener.of()]
    stop = tokens[3]
    stopped = job([0, 5, 9], 8, stop_ids=frozenset([stop]))
    told = job([0, 5, 9], 8, ends=[lambda token: token == stop])
    running.submit(stopped, told)
    for one in (stopped, told):
        assert [event.token for event in one.listener.of()] == tokens[: tokens.index(stop) + 1]
        assert one.listener.events[-1] == Ended(0, "stop")
    assert free.listener.events[-1] == Ended(0, "length")


def test_a_queue_has_an_end_and_slots_come_free(engine):
    running = engine("decoder", queue=2)
    with pytest.raises(Refused, match="full"):
        running.submit(job([0, 5], MAX_TOKENS, answers=SLOTS + 3))
    long = [job([0, 5], MAX_TOKENS) for _ in range(SLOTS + 2)]
    running.submit(*long)
    late = job([0, 5], deadline=0.0)
    with pytest.raises(Refused, match="full"):
        running.submit(late, late)
    for one in long[1:]:
        running.cancel(one)
    long[0].listener.of()
    while running.running or running.waiting:
        time.sleep(0.005)
    assert not any(one.listener.done.is_set() for one in long[2:])
    running.submit(late)
    assert late.listener.of() == [] and late.listener.events == [Failed(LATE)]


def test_a_step_that_fails_is_told_and_the_next_request_is_answered(engine, monkeypatch):
    running = engine("decoder")
    wanted = job([0, 5, 9])
    running.submit(wanted)
    wanted.listener.of()
    step = running.programs.step
    monkeypatch.setattr(running.programs, "step", lambda controls: 1 / 0)
    broken = job([0, 5, 9])
    running.submit(broken)
    assert broken.listener.of() == [] and broken.listener.events[-1] == Failed("broken")
    monkeypatch.setattr(running.programs, "step", step)
    again = job([0, 5, 9])
    running.submit(again)
    assert again.listener.of() == wanted.listener.of()


@pytest.mark.parametrize("what", ["prefill", "insert", "step"])
def test_a_prompt_or_a_step_that_fails_is_nobody_elses(engine, monkeypatch, what):
    """Of a prompt whose experts can't be read nobody else hears; of a failed step those who wait for a slot don't."""
    running = engine("decoder")
    wanted = job([0, 5, 9])
    running.submit(wanted)
    wanted.listener.of()
    right, bad = getattr(running.programs, what), [0, 7, 7]
    held = threading.Event()

    def broken(*given):
        if what == "prefill" and given[0] != bad:
            return right(*given)
        if what != "prefill":
            monkeypatch.setattr(running.programs, what, right)
        raise OSError("expert 3 of decoder/1 is damaged")

    first = [job([0, 5, 9], ends=[lambda token: held.wait(60) and False])]
    first += [job([0, 5, 9]) for _ in range(SLOTS - 2)]
    failing, waiting = job(bad), [job([0, 5, 9]) for _ in range(SLOTS)]
    running.submit(*first)
    while not first[0].tokens:
        time.sleep(0.005)
    monkeypatch.setattr(running.programs, what, broken)
    running.submit(failing, *waiting)
    held.set()
    assert failing.listener.of() == [] and failing.listener.events[-1] == Failed("broken")
    for one in [*first, *waiting] if what == "prefill" else waiting:
        assert one.listener.of() == wanted.listener.of()


def test_a_prompts_memory_is_free_when_nobody_needs_it(engine, monkeypatch):
    """At once, not when the garbage collector comes: of answers, of scores alone, of who is late or left."""
    running, seen = engine("decoder"), []
    prefill = running.programs.prefill

    class Kept:
        def __init__(self, value):
            self.value = value

        def __getattr__(self, name):
            return getattr(self.value, name)

    def watched(ids):
        found = Kept(prefill(ids))
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(running.programs, "prefill", watched)
    held = threading.Event()
    left = job([0, 5, 9], answers=SLOTS + 1, ends=[lambda token: held.wait(60) and False] * (SLOTS + 1))
    gc.disable()
    try:
        for one in (job([0, 5, 9], answers=2), job([0, 5, 9], 0, scores=True), job([0, 5, 9], 0, answers=2)):
            running.submit(one)
            one.listener.of()
        running.submit(left)
        while not left.tokens:
            time.sleep(0.005)
        assert seen[-1]() is not None, "an answer still waits"
        running.cancel(left)
        held.set()
        while running.running or running.waiting:
            time.sleep(0.005)
        assert len(seen) == 4 and [one() for one in seen] == [None] * 4
    finally:
        gc.enable()


def test_closing_drains_and_then_cuts(engine):
    running = engine("decoder")
    last = [job([0, 5, 9], 3) for _ in range(7)]
    running.submit(*last)
    assert running.stop(60) and all(len(one.listener.of()) == 3 for one in last)
    with pytest.raises(Refused, match="closed"):
        running.submit(job([0, 5]))
    other = engine("decoder")
    held = job([0, 5, 9], ends=[lambda token: time.sleep(0.4)])
    other.submit(held)
    assert not other.stop(0.3) and held.listener.events[-1] == Failed(CLOSED)


def test_a_slot_keeps_nothing_of_who_was_there_before():
    """Not even numbers that are none."""
    made = warmed("decoder")
    made.reset()
    controls = serving.Controls.empty(SLOTS)
    prefilled = made.prefill([0, 7, 8])
    controls.position_B[1] = made.first_position(prefilled)
    made.insert(prefilled, 1)
    wanted = made.step(controls)
    made._state = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, made._state
    )
    made.insert(prefilled, 1)
    found = made.step(controls)
    assert found.token_B[1] == wanted.token_B[1] and found.log_prob_B[1] == wanted.log_prob_B[1]
    made.reset()
