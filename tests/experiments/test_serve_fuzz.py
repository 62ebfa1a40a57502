"""schemathesis over the server's own description: nothing that it makes is answered otherwise than described, or by a failure."""

import pytest
import serving

schemathesis = pytest.importorskip("schemathesis")
import httpx  # noqa: E402
import hypothesis  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

CALM = dict(
    deadline=None, suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate]
)
running = serving.running  # a fixture


@pytest.fixture(scope="module")
def description(running):
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def ask(description, running, examples):
    seen = set()
    for found in description.get_all_operations():
        operation = found.ok()

        def one(case):
            answer = case.call(timeout=60)
            seen.add(answer.status_code)
            # A schema cannot say how many tokens a text has, and what goes with what: there the answer has to.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])
            assert answer.status_code < 500, answer.text
            assert (
                answer.status_code < 400
                or "accepted" in answer.json()["error"]["message"]
                or answer.status_code == 405
            )

        # What has no fields can't be asked wrongly.
        modes = (
            list(schemathesis.GenerationMode)
            if operation.method == "post"
            else [schemathesis.GenerationMode.POSITIVE]
        )
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)
            hypothesis.settings(max_examples=examples, **CALM)(hypothesis.given(case=strategy)(one))()
    assert 200 in seen and 400 in seen
    assert running.idle() and httpx.get(f"{running.url}/health", timeout=60).status_code == 200


@pytest.mark.slow
def test_what_the_description_allows_and_what_it_does_not(description, running):
    ask(description, running, 15)


@pytest.mark.long
def test_the_same_for_longer(description, running):
    ask(description, running, 300)
