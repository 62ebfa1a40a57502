"""The room every test runs in: eight virtual CPU devices, strict ranks, and caches of its own.

The environment is set before anything imports JAX, so this file imports it last. Tests of one device
use device 0; tests of sharding build their mesh over the first few.
"""

import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Kept under names of their own, as pytest-xdist's workers inherit what is set below.
_XLA_FLAGS = os.environ.setdefault("SWITCHMOE_USER_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
_KEPT = "SWITCHMOE_TEST_CACHE" in os.environ  # whoever names a place has it for several test runs, as CI does
_CACHE = os.environ.get("SWITCHMOE_TEST_CACHE") or tempfile.mkdtemp(prefix="switchmoe-tests-")
os.environ["SWITCHMOE_TEST_CACHE"] = _CACHE

# Most of a test's time is compilation, so code is generated without optimisation.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS} {_FLAGS}".strip()
os.environ["XDG_CACHE_HOME"] = _CACHE
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that several tests or commands need are compiled once. The cache is this test run's own, or this
# machine's: one from another may hold code that is not bitwise the same.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_CACHE, "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

with contextlib.suppress(ImportError):
    import hypothesis

    # The first example pays for compilation: a deadline would say nothing.
    hypothesis.settings.register_profile("switchmoe", deadline=None, derandomize="CI" in os.environ)
    hypothesis.settings.load_profile("switchmoe")


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ and not _KEPT:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """What a file has compiled goes with it: a process that kept all programs of the suite ran out of memory maps and died."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def user_environment():
    """Environment variables for a subprocess that stands for a user's command: one CPU device.

    Prepared data and vocabularies are the session's, so only the first such command makes them. The
    source tree is on its path, so it works in any directory and where nothing is installed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if _XLA_FLAGS:
        environment["XLA_FLAGS"] = _XLA_FLAGS
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


@pytest.fixture(scope="session")
def environment(user_environment):
    """The same, and compiled without optimisation: the same program in every process, and sooner."""
    return user_environment | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A page in a browser, where there is one."""
    import browser

    if browser.BINARY is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    found = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def table():
    """Collects rows of docs/faults.md, which are printed at the end."""
    rows = []
    yield lambda *row: rows.append(row)
    if rows:
        print("\n\n| fault | what happened | lost |\n|---|---|---|")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))


@pytest.fixture
def one_device(monkeypatch):
    """A run in this very process is one on a single device."""
    from switchmoe.parallel import sharding

    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
