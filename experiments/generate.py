"""Text from a trained model: ``python -m experiments.generate --source=RUN [--prompt=TEXT ...] [--OPTION=VALUE ...]``

RUN is a run's directory (its newest step), DIR|STEP or DIR/checkpoints/STEP. A decoder alone continues a prompt. An
encoder-decoder answers it: the continuation with prefix_lm; with span_corruption what belongs in place of <extra_id_0>,
<extra_id_1>, ... Without a prompt they are read from standard input, a line each; on a terminal it asks for them.

  --prompt=TEXT          a prompt; may be given several times
  --file=FILE            a prompt a line; of .jsonl the field prompt (with --ids: ids) of each line's object
  --ids                  token ids instead of text, in and out: --prompt="0 17 23", lines of {"ids": [0, 17, 23]} in a file;
                         as the model reads them (an encoder's end with data.eos_id, 1; a decoder's begin with data.bos_id, 0)
  --out=FILE             writes {"prompt", "text", "ids", "score"} a line, in the order asked, instead of printing the text
  --max_tokens=N         new tokens at most (64)
  --temperature=T        draws each token, with logits / T; 0 (the default): always the likeliest
  --top_k=K              draws among the K likeliest; 0 (the default): all
  --top_p=P              draws among the fewest whose probabilities sum to P (1)
  --beams=W              beam search (1)
  --length_penalty=A     of beam search: scores are log-probabilities / length**A (1)
  --stop=ID              a token after which nothing comes, beside EOS; may be given several times
  --seed=N               of what is drawn (0)
  --batch_size=N         prompts at once (16)
  --config.model.dtype=  float32 | bfloat16: the kernels' type (the run's)
  --expert_memory=SIZE   experts stay on disk, but for so many bytes of them (512MiB, 2GB; docs/offload.md); their files are
                         written into RUN the first time
  --predictor=none       what the next layer needs is foreseen, and read ahead, by: none | router, the next layer's | FILE of
                         experiments.offload predict
  --expert_policy=lfru   which experts leave: lru | lfu | lfru | least_stale
  --expert_reads=direct  direct, past the page cache | pread | mmap

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import command_line, exits, expert_memory, process

NUMBERS: dict[str, tuple[Callable, str]] = {  # option: its type, and what is accepted
    "max_tokens": (int, "an integer >= 1"),
    "temperature": (float, "a number >= 0"),
    "top_k": (int, "an integer >= 0"),
    "top_p": (float, "a number > 0, at most 1"),
    "beams": (int, "an integer >= 1"),
    "length_penalty": (float, "a number from -10 to 10"),
    "seed": (int, "an integer from 0 to 2**31 - 1"),
    "batch_size": (int, "an integer >= 1"),
}
Note = Callable[[str], None]


@dataclasses.dataclass
class Arguments:
    source: str = ""
    file: str = ""
    out: str = ""
    ids: bool = False
    prompt: list[str] = dataclasses.field(default_factory=list)
    stop: list[int] = dataclasses.field(default_factory=list)
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0
    batch_size: int = 16
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    experts: dict[str, str] = dataclasses.field(default_factory=dict)  # of expert_memory.OPTIONS


class Prompt(NamedTuple):
    shown: str | list[int]
    ids: list[int]


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded("experiments.generate", lambda: _generate(parse(argv[1:])))


def parse(arguments: Sequence[str]) -> Arguments:
    """Raises ValueError, one line that names the argument, its value and what would be accepted."""
    overrides, others = command_line.overrides(arguments)
    found = Arguments(overrides=overrides)
    for argument in others:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--ids":
            found.ids = True
        elif not (
            argument.startswith("--")
            and equals
            and name in ("source", "file", "out", "prompt", "stop", *NUMBERS, *expert_memory.OPTIONS)
            and (value or name not in expert_memory.OPTIONS)
        ):
            names = ("source", "prompt", "file", "out", *NUMBERS, "stop", *expert_memory.OPTIONS)
            raise ValueError(command_line.unknown(argument, [*(f"--{one}=" for one in names), "--ids"]))
        elif name in ("prompt", "stop"):
            getattr(found, name).append(value if name == "prompt" else _number(name, value))
        elif name in expert_memory.OPTIONS:
            found.experts[name] = value
        elif name in NUMBERS:
            setattr(found, name, _number(name, value))
        else:
            setattr(found, name, value)
    if not found.source:
        raise ValueError("no model; accepted is --source=RUN")
    for name, value in (
        ("max_tokens", found.max_tokens),
        ("beams", found.beams),
        ("batch_size", found.batch_size),
    ):
        if value < 1:
            raise ValueError(f"--{name}={value}: accepted is an integer >= 1")
    for name, limits in (("top_k", found.top_k), ("top_p", 0 < found.top_p < 1)):
        if limits and not found.temperature:
            raise ValueError(
                f"--{name}={getattr(found, name)}: accepted with --temperature= above 0, which draws"
            )
    expert_memory.checked(found.experts)
    if found.file and found.prompt:
        raise ValueError(f"--file={found.file}: accepted is --file= or --prompt=, not both")
    if found.out and (Path(found.out).is_dir() or not Path(found.out).parent.is_dir()):
        raise ValueError(f"--out={found.out}: accepted is a file in a directory that is there")
    return found


def _number(name: str, text: str) -> Any:
    kind, accepted = NUMBERS.get(name, (int, "a token's id"))
    try:
        value = kind(text)
        least, most = (-10, 10) if name == "length_penalty" else (0, 2**31 - 1)
        if not least <= value <= most:
            raise ValueError
    except ValueError:
        raise ValueError(f"--{name}={text}: accepted is {accepted}") from None
    return value


def _generate(arguments: Arguments) -> int:
    asked = _asked(arguments)
    process.check_devices()
    generator, prompt_of, text_of, pager = _model(arguments)
    try:
        return _answered(arguments, asked, generator, prompt_of, text_of)
    finally:
        if pager:
            print(pager.counts, file=sys.stderr)


def _answered(
    arguments: Arguments,
    asked: list[tuple[str, Any]] | None,
    generator: Any,
    prompt_of: Callable[[Any], Prompt],
    text_of: Callable[[Prompt, list[int]], str] | None,
) -> int:
    if asked is None and arguments.out:
        raise ValueError(
            f"--out={arguments.out}: accepted with --prompt=, --file= or prompts on standard input"
        )
    if asked is None:
        return _converse(generator, prompt_of, None if arguments.ids else text_of)
    prompts = []
    for where, given in asked:
        try:
            prompts.append(prompt_of(given))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not prompts:
        raise ValueError(f"--file={arguments.file}: no prompts; accepted is one a line")
    answers = _answers(generator, [prompt.ids for prompt in prompts])
    if not arguments.out:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(
                json.dumps(_record(prompt, answer, text_of))
                if arguments.ids
                else text_of(prompt, answer.ids),
                flush=True,
            )
        return 0
    part = Path(f"{arguments.out}.part")
    with part.open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(json.dumps(_record(prompt, answer, text_of), ensure_ascii=False) + "\n")
    part.replace(arguments.out)
    return 0


def _record(prompt: Prompt, answer: Any, text_of: Callable | None) -> dict[str, Any]:
    text = text_of(prompt, answer.ids) if text_of else None
    return {"prompt": prompt.shown, "text": text, "ids": answer.ids, "score": answer.score}


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _answers(generator: Any, prompts: list[list[int]]) -> Iterator[Any]:
    """One for each prompt, as they come, with a sign of life where it takes long."""
    from switchmoe.data.progress import told

    done = [0]
    state = lambda: f"{done[0]} of {len(prompts)} prompts"  # noqa: E731
    with told(_note, "compiling and generating", state, at_once=True):
        for done[0], answers in generator.batches(prompts):
            yield from answers


def _model(
    arguments: Arguments,
) -> tuple[Any, Callable[[Any], Prompt], Callable[[Prompt, list[int]], str] | None, Any]:
    """(generator, a prompt of what was given, the text of a prompt's answer if there is a vocabulary, what brings experts in or None)."""
    from switchmoe.data.progress import told
    from switchmoe.inference import generation
    from switchmoe.inference.decoding import Choosing
    from switchmoe.runs import trained
    from switchmoe.settings import MeshSettings

    model = trained.find(arguments.source)
    vocabulary = model.vocabulary
    if vocabulary is None and not arguments.ids:
        raise ValueError(f"--source={arguments.source}: it has no vocabulary; accepted is --ids")
    settings = trained.changed(model.settings, arguments.overrides)
    settings = dataclasses.replace(settings, mesh=MeshSettings())  # one device, however it was trained
    eos = settings.data.eos_id if vocabulary is None else vocabulary.eos_id
    for token in arguments.stop:
        if token >= settings.embedding_rows:
            raise ValueError(f"--stop={token}: accepted is a token's id, below {settings.embedding_rows}")
    how = Choosing(arguments.temperature, arguments.top_k, arguments.top_p, (eos, *arguments.stop))
    numbers = arguments.max_tokens, how, arguments.beams, arguments.length_penalty
    budget, how_paged = expert_memory.checked(arguments.experts)
    last = arguments.batch_size, arguments.seed
    pager = None
    if budget:
        settings, params, pager = expert_memory.opened(model, settings, budget, how_paged, _note)
        last += (pager.check,)
    else:
        with told(_note, f"reading {model.step}"):
            params = trained.on_one_device(model, settings)
    generator = generation.Generator(settings, params, *numbers, *last)

    def prompt_of(given: Any) -> Prompt:
        if not arguments.ids and not _is_unicode(given):
            raise ValueError("a prompt that is not Unicode; accepted is UTF-8")
        ids = given if arguments.ids else generation.prompt_ids(given, settings, vocabulary)
        generator.check(ids)
        return Prompt(given, ids)

    def text_of(prompt: Prompt, ids: list[int]) -> str:
        before = prompt.shown if isinstance(prompt.shown, str) else vocabulary.decode(prompt.ids)
        goes_on = generation.continues(before, settings)
        return vocabulary.continuation(ids) if goes_on else vocabulary.decode(ids)

    return generator, prompt_of, text_of if vocabulary else None, pager


def _is_unicode(text: str) -> bool:
    """Without halves of surrogate pairs, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _asked(arguments: Arguments) -> list[tuple[str, Any]] | None:
    """(where it stands, a prompt) of each; None: they are asked for on the terminal.

    Raises:
      ValueError: a line that holds no prompt.
    """
    if arguments.prompt:
        lines = [(f"--prompt={text.encode('utf-8', 'replace').decode()}", text) for text in arguments.prompt]
        return [(where, _ids(where, text) if arguments.ids else text) for where, text in lines]
    if not arguments.file and sys.stdin.isatty():
        return None
    name = arguments.file or "standard input"
    try:
        text = Path(name).read_text(encoding="utf-8-sig") if arguments.file else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--file={name}: {error}; accepted is UTF-8") from error
    lines = [(f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = arguments.ids or arguments.file.endswith((".jsonl", ".ndjson"))
    return [(where, _field(where, line, arguments.ids) if records else line) for where, line in lines]


def _field(where: str, line: str, ids: bool) -> Any:
    if ids and not line.lstrip().startswith("{"):
        return _ids(where, line)
    name = "ids" if ids else "prompt"
    accepted = '{"ids": [INTEGER, ...]}' if ids else '{"prompt": "TEXT"}'
    try:
        value = json.loads(line)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{where}: {line[:80]}: accepted is {accepted}") from None
    good = (
        isinstance(value, list) and all(type(token) is int for token in value)
        if ids
        else isinstance(value, str)
    )
    if not good:
        raise ValueError(f"{where}: {line[:80]}: accepted is {accepted}")
    return value


def _ids(where: str, text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{where}: accepted with --ids are integers") from None


def _converse(generator: Any, prompt_of: Callable, text_of: Callable | None) -> int:
    """Answers lines of the terminal until it ends."""
    from switchmoe.data.progress import told

    _note("a prompt a line; Ctrl-D to end")
    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            return 0
        if not line.strip():
            continue
        try:
            prompt = prompt_of(line if text_of else _ids("prompt", line))
        except ValueError as error:
            _note(str(error))
            continue
        with told(_note, "answering" if number else "compiling and answering", at_once=not number):
            (answer,) = generator([prompt.ids], number)
        print(text_of(prompt, answer.ids) if text_of else answer.ids, flush=True)
        number += 1


if __name__ == "__main__":
    exits.leave("experiments.generate", main)
