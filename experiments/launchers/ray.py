"""A sweep's runs as tasks of a Ray cluster: ``--launcher=ray --address=auto|local|HOST:PORT|ray://HOST:PORT``

``--resources`` are those of one run: CPU, GPU, memory (GiB) and what else the cluster's nodes have, as TPU=4 and
TPU-v5p-8-head=1 of a slice. Ray gives a run a node that has them, as many at once as there is room for.
"""

import os
import socket
import sys

import ray

from experiments.exits import EXIT_FAILED, EXIT_LOST, EXIT_STOPPED
from experiments.launchers.node import Work, ask, began, look_again, note, prepare
from experiments.launchers.order import Options, Order

CONNECT = 10.0  # seconds


class Ray:
    """Raises ValueError where there is no such cluster."""

    here, at_once = False, sys.maxsize

    def __init__(self, options: Options):
        self.retries = options.retries
        _connect(options.address)
        asked = dict(options.resources)
        self._warn(asked)
        named = {"num_cpus": asked.pop("CPU"), "num_gpus": asked.pop("GPU", 0)}
        if "memory" in asked:
            named["memory"] = asked.pop("memory") * 2**30
        # A lost run is started again by the sweep, which counts; Ray would do so without end where memory ran out.
        self._task = ray.remote(_work).options(**named, resources=asked, max_retries=0)

    def _warn(self, asked: dict[str, float]) -> None:
        scale = {"memory": 2**30}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= v * scale.get(k, 1) for k, v in asked.items()) for node in nodes):
            text = ",".join(f"{name}={amount:g}" for name, amount in asked.items())
            print(f"experiments.sweep: no node has {text} now; runs wait for one", file=sys.stderr)

    def start(self, order: Order) -> "_Task":
        prepare(order)
        return _Task(order, self._task.remote(order))

    def close(self) -> None:
        ray.shutdown()


def _work(order: Order) -> int:
    return Work(order)()


class _Task:
    def __init__(self, order: Order, task: "ray.ObjectRef"):
        self._order, self._task, self._stopped = order, task, False

    @property
    def queued(self) -> bool:
        return not began(self._order)

    def wait(self, seconds: float) -> int | None:
        if self._stopped and self.queued:
            ray.cancel(self._task)
        if not ray.wait([self._task], timeout=seconds)[0]:
            return None
        try:
            code = ray.get(self._task)
        except ray.exceptions.TaskCancelledError:
            return EXIT_STOPPED
        except ray.exceptions.RayTaskError as error:
            note(self._order, _line(error.cause))
            return EXIT_FAILED
        except ray.exceptions.RayError as error:
            note(self._order, f"lost: {_line(error)}")
            return EXIT_LOST
        look_again(self._order)
        return code

    def stop(self, number: int) -> None:
        self._stopped = True
        ask(self._order, number)


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wrong = ValueError(
        f"--address={address}: accepted are auto, local, HOST:PORT and ray://HOST:PORT of a Ray cluster that is up"
    )
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdecimal() and int(port) < 2**16):
            raise wrong
        try:  # before Ray, which takes a minute to say the same
            socket.create_connection((host, int(port)), timeout=CONNECT).close()
        except OSError as error:
            raise ValueError(f"{wrong} ({error})") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(f"{wrong} ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
