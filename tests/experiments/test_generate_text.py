"""`experiments.generate`: a prompt and its answer's text are one text where the answer goes on with the prompt."""

import dataclasses
import types

import pytest
from serving import TEXT, parameters, settings, vocabulary

from experiments import exits, generate
from switchmoe.runs import trained


@pytest.mark.parametrize("given", ["text", "ids"])
@pytest.mark.parametrize("kind, objective", [("decoder", ""), ("switch", ""), ("switch", "prefix_lm")])
def test_an_answer_has_the_blank_between_it_and_its_prompt(kind, objective, given, monkeypatch):
    normalised, of = vocabulary(normalised=True), settings(kind)
    if objective:
        of = dataclasses.replace(of, data=dataclasses.replace(of.data, objective=objective))
    model = types.SimpleNamespace(settings=of, vocabulary=normalised, step="a step")
    monkeypatch.setattr(trained, "find", lambda source: model)
    monkeypatch.setattr(trained, "on_one_device", lambda model, settings: parameters(kind))
    asked = ["--source=run", "--ids"] if given == "ids" else ["--source=run"]
    _, prompt_of, text_of, _ = generate._model(generate.parse(asked))
    whole, before = TEXT.split(";")[0], "The river Main,"
    first, answer = normalised.encode(before), normalised.encode(whole)[len(normalised.encode(before)) :]
    assert normalised.decode(first) == before
    prompt = prompt_of(before if given == "text" else [0, *map(int, first)])
    found = text_of(prompt, [*map(int, answer), normalised.eos_id])
    if kind == "decoder" or objective == "prefix_lm":
        assert before + found == normalised.decode(normalised.encode(whole))
    else:
        assert found == normalised.decode(answer), "a text of its own"
    beginning = text_of(prompt_of(" " if given == "text" else [0]), [*map(int, answer)])
    assert beginning == normalised.decode(answer), "nothing is before it"


def test_a_bad_prompt_of_several_lines_gets_one_line(capsys, monkeypatch):
    model = types.SimpleNamespace(settings=settings("decoder"), vocabulary=vocabulary(), step="a step")
    monkeypatch.setattr(trained, "find", lambda source: model)
    monkeypatch.setattr(trained, "on_one_device", lambda model, settings: parameters("decoder"))
    assert (
        generate.main(["generate", "--source=run", "--prompt=caf\udce9\nthe river"]) == exits.EXIT_BAD_INPUT
    )
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("experiments.generate: ") and "--prompt='caf\\udce9\\nthe river': a prompt" in told
