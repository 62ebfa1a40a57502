"""What a server counts: vLLM's names where they fit, so that its dashboards work, and our own for experts.

Nothing of a request's text is in them. Letters: L sparse layers, B slots, P prompt length, K choices.
"""

import time

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from switchmoe.inference.serving.engine import Engine, Job, Watcher

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = tuple(2**n for n in range(14))


class Metrics(Watcher):
    """Counts for one served model."""

    def __init__(self, model: str, prompt_layers: list[str], layers: list[str], experts: int):
        self.registry = CollectorRegistry()
        self._prompt_layers, self._layers, self._experts = prompt_layers, layers, experts

        def made(kind, name, text, *labels, **options):
            whole = kind(name, text, ("model_name", *labels), registry=self.registry, **options)
            return whole if labels else whole.labels(model)

        self._model = model
        self._running = made(Gauge, "vllm:num_requests_running", "Answers in slots")
        self._waiting = made(Gauge, "vllm:num_requests_waiting", "Answers that wait for a slot")
        self._usage = made(Gauge, "vllm:kv_cache_usage_perc", "Slots in use, of 1")
        self._prompt = made(Counter, "vllm:prompt_tokens", "Tokens of prompts that were read")
        self._generated = made(Counter, "vllm:generation_tokens", "Tokens generated")
        self._success = made(Counter, "vllm:request_success", "Answers that ended", "finished_reason")
        self._first = made(Histogram, "vllm:time_to_first_token_seconds", "From arrival", buckets=SECONDS)
        self._each = made(
            Histogram, "vllm:inter_token_latency_seconds", "From a token to the next", buckets=SECONDS
        )
        self._whole = made(
            Histogram, "vllm:e2e_request_latency_seconds", "From arrival to the end", buckets=SECONDS
        )
        self._queued = made(
            Histogram, "vllm:request_queue_time_seconds", "From arrival to the prompt", buckets=SECONDS
        )
        self._lengths = made(Histogram, "vllm:request_prompt_tokens", "Of each prompt", buckets=TOKENS)
        self._answers = made(
            Histogram, "vllm:request_generation_tokens", "Of each prompt's answers", buckets=TOKENS
        )
        self._failed = made(
            Counter, "switchmoe:requests_failed", "Prompts without all their answers", "reason"
        )
        self._status = made(Counter, "switchmoe:http_responses", "Responses", "status")
        self._steps = made(Counter, "switchmoe:steps", "Steps of all slots")
        self._load = made(Counter, "switchmoe:expert_tokens", "Choices of an expert", "layer", "expert")
        self._dropped = made(Counter, "switchmoe:dropped_tokens", "Tokens that no expert took", "layer")

    def text(self, engine: Engine) -> bytes:
        self._running.set(engine.running)
        self._waiting.set(engine.waiting)
        self._usage.set(engine.running / engine.programs.slots)
        return generate_latest(self.registry)

    def answered(self, status: int) -> None:
        self._status.labels(self._model, str(status)).inc()

    def opened(self, job: Job, expert_LPK: np.ndarray | None) -> None:
        self._prompt.inc(len(job.ids))
        self._lengths.observe(len(job.ids))
        self._queued.observe(job.started - job.arrived)
        self._count(self._prompt_layers, expert_LPK)

    def stepped(self, rows: int, expert_LBK: np.ndarray | None) -> None:
        self._steps.inc()
        self._generated.inc(rows)
        self._count(self._layers, expert_LBK)

    def waited(self, seconds: float) -> None:
        self._each.observe(seconds)

    def ended(self, job: Job, why: str) -> None:
        if why in ("stop", "length"):
            self._success.labels(self._model, why).inc()
        else:
            self._failed.labels(self._model, why).inc()
        if job.open:
            return
        self._whole.observe(time.monotonic() - job.arrived)
        if job.first:
            self._first.observe(job.first - job.arrived)
            self._answers.observe(job.tokens)

    def _count(self, layers: list[str], expert_LNK: np.ndarray | None) -> None:
        if expert_LNK is None:
            return
        for layer, expert_NK in zip(layers, expert_LNK, strict=True):
            _, *used = np.bincount(expert_NK.reshape(-1) + 1, minlength=self._experts + 1).tolist()
            dropped = int((expert_NK < 0).all(axis=-1).sum())
            for expert, count in enumerate(used):
                if count:
                    self._load.labels(self._model, layer, str(expert)).inc(count)
            if dropped:
                self._dropped.labels(self._model, layer).inc(dropped)
