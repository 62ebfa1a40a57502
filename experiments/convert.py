"""Checkpoints of other code bases in and out: ``python -m experiments.convert --source=SOURCE --target=DIR [--OPTION=VALUE ...]``

SOURCE is a Hugging Face directory (safetensors, or pytorch_model*.bin, read without torch), a hub's name with --revision=, a
T5X checkpoint's directory, or a run of this code base (its directory, DIR|STEP or DIR/checkpoints/STEP). DIR becomes, of the
first three, a run's directory that init.checkpoint, generate and evaluate take; of the last, a Hugging Face directory that
from_pretrained loads. Families: Switch, T5, T5 1.1, Flan-T5, mT5, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE; of T5X Switch and T5 1.1.

  --dtype=float32|bfloat16   of what is written (the source's)
  --shard=5GB                at most so much in a safetensors file
  --revision=REVISION        a hub's branch or commit
  --check[=True|False]       compares both models' logits on random sequences (True where transformers is installed and
                             memory has both, whole in float32)
  --tolerance=N              of the check, a share of the largest logit (1e-4; both compute in float32, of weights rounded alike)

A dense model made sparse (2212.05055), of SOURCE any of the above:

  --upcycle.experts=E        copies of each feed-forward
  --upcycle.every=2          in the last of so many blocks
  --upcycle.router=switch    switch (one expert a token) | top_k (two) | expert_choice (in an encoder; switch in the decoder)
  --upcycle.noise=0          standard deviation of what is added to the copies, a share of each kernel's own
  --upcycle.reinit=0         share of each expert's width that is drawn anew (drop-upcycling, 2502.19261)
  --upcycle.optimizer=True   copies the optimizer's state too, where the source has one

A run's experts in files of their own (docs/offload.md), for experiments.generate and experiments.serve with --expert_memory=:

  --experts_on_disk[=FORM]   float32 | bfloat16 | int8 | int4 (as they are); DIR becomes a run's directory whose checkpoint has all
                             but the experts
  --widths=FILE              of experiments.offload widths: each expert's own integers

A conversion that was killed goes on with the same command. Exit codes: 0 done; 2 bad input; 3 the check found a difference; 4
a file that can't be written or read.
"""

import math
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from experiments import exits, process

EXIT_DIFFERENT = 3
DTYPES = ("float32", "bfloat16")
BOOLS = {"True": True, "true": True, "False": False, "false": False}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
OPTIONS = (
    "source",
    "target",
    "dtype",
    "shard",
    "revision",
    "check",
    "tolerance",
    "experts_on_disk",
    "widths",
)
OWN = "own"
NO_T5X = "transformers reads no T5X checkpoint"
BARE = {"--experts_on_disk": OWN, "--check": "True"}  # options without a value
FORMS = (OWN, "float32", "bfloat16", "int8", "int4")
UPCYCLE: dict[str, Any] = {  # option: its type
    "experts": int,
    "every": int,
    "router": str,
    "noise": float,
    "reinit": float,
    "optimizer": bool,
}


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded("experiments.convert", lambda: _convert(parse(argv[1:])))


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Raises ValueError, one line that names the argument, its value and what would be accepted."""
    found: dict[str, Any] = {
        "dtype": "",
        "shard": "5GB",
        "revision": "",
        "check": "",
        "tolerance": "",
        "experts_on_disk": "",
        "widths": "",
        "upcycle": {},
    }
    accepted = [f"--{name}=" for name in (*OPTIONS, *(f"upcycle.{name}" for name in UPCYCLE))]
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument in BARE:
            equals, value = "=", BARE[argument]
        if not (argument.startswith("--") and equals and f"--{name}=" in accepted):
            raise ValueError(f"argument {argument}: accepted are {', '.join(accepted)}")
        if name.startswith("upcycle."):
            found["upcycle"][name.removeprefix("upcycle.")] = _typed(name, value)
        else:
            found[name] = value
    for name, what in (
        ("source", "a directory or a hub's name"),
        ("target", "a directory that is not there yet"),
    ):
        if not found.get(name):
            raise ValueError(f"no {name}; accepted is --{name}=, {what}")
    if found["dtype"] and found["dtype"] not in DTYPES:
        raise ValueError(f"--dtype={found['dtype']}: accepted is one of {', '.join(DTYPES)}")
    if found["check"] and found["check"] not in BOOLS:
        raise ValueError(f"--check={found['check']}: accepted is True or False")
    size = re.fullmatch(r"(\d+)([KMGT]B)?", found["shard"])
    if not size or not int(size[1]):
        raise ValueError(f"--shard={found['shard']}: accepted is a size such as 5GB or 500MB")
    found["shard"] = int(size[1]) * UNITS[size[2] or ""]
    if found["upcycle"] and "experts" not in found["upcycle"]:
        raise ValueError("--upcycle.experts: accepted is a number of experts, 2 or more")
    if found["tolerance"]:
        given, found["tolerance"] = found["tolerance"], _typed("tolerance", found["tolerance"])
        if not 0 < found["tolerance"] < math.inf:
            raise ValueError(f"--tolerance={given}: accepted is a number above 0")
    _check_on_disk(found)
    for name in ("check", "tolerance"):
        if found["upcycle"] and found[name]:
            raise ValueError(
                f"--{name}={found[name]}: accepted without --upcycle, after which the models differ"
            )
    return found


def _check_on_disk(found: dict[str, Any]) -> None:
    form, widths = found["experts_on_disk"], found["widths"]
    if widths and form != OWN:
        raise ValueError(
            f"--widths={widths}: accepted with --experts_on_disk, which has no form of its own then"
        )
    if form and form not in FORMS:
        raise ValueError(f"--experts_on_disk={form}: accepted is one of {', '.join(FORMS)}")
    for name in ("dtype", "check", "tolerance", "upcycle", "revision") if form else ():
        if found[name]:
            raise ValueError(f"--experts_on_disk={form}: accepted without --{name}")


def _typed(name: str, value: str) -> Any:
    kind = UPCYCLE.get(name.removeprefix("upcycle."), float)
    try:
        if kind is bool:
            return BOOLS[value]
        return kind(value)
    except (ValueError, KeyError) as error:
        told = {bool: "True or False", int: "an integer", float: "a number"}[kind]
        raise ValueError(f"--{name}={value}: accepted is {told}") from error


def _convert(found: dict[str, Any]) -> int:
    process.check_devices()
    process.keep_quiet()
    from switchmoe.interop import check, convert, upcycle
    from switchmoe.runs import trained, upcycling

    target, dtype = Path(found["target"]).expanduser(), found["dtype"]
    if found["upcycle"]:
        report = upcycle.upcycle(
            _source(found), target, dtype, upcycling.Upcycling(**found["upcycle"]), told, note
        )
        print(f"{target}: {report}")
        return 0
    if found["experts_on_disk"]:
        return _experts_on_disk(found, target)
    wanted = BOOLS[found["check"]] if found["check"] else check.available()
    if wanted and not check.available():
        raise ValueError(
            "--check=True: accepted with transformers 5.18 or newer and torch (pip install '.[hf]')"
        )
    source = _source(found)
    own = convert.is_run(source)
    model = trained.find(str(source)) if own else convert.recognised(source)
    lacking = check.lacking(model.settings) if own or (source / "config.json").exists() else NO_T5X
    if found["check"] and wanted and lacking:
        raise ValueError(f"--check={found['check']}: {lacking}; accepted is --check=False")
    if own:
        report = convert.into_hugging_face(model, target, dtype, found["shard"], told)
    else:
        report = convert.into_run(model, target, dtype, told)
    print(f"{target}: {report}")
    if wanted and lacking:
        print(f"no check: {lacking}")
    if not wanted or lacking:
        return 0
    run, other = (source, target) if own else (target, source)
    return _checked(str(run), other, found["tolerance"])


def _experts_on_disk(found: dict[str, Any], target: Path) -> int:
    from switchmoe.interop import expert_store
    from switchmoe.runs import trained

    model = trained.find(found["source"])
    forms: Any = "" if found["experts_on_disk"] == OWN else found["experts_on_disk"]
    if found["widths"]:
        forms = expert_store.widths(Path(found["widths"]).expanduser(), model.settings)
    print(f"{target}: {expert_store.into_run(model, target, forms, told)}")
    return 0


def _checked(run: str, other: Path, tolerance: float) -> int:  # 0: the default
    """Compares a run with a Hugging Face directory; the exit code."""
    import dataclasses

    from switchmoe.interop import check, sources
    from switchmoe.runs import trained

    model = trained.find(run)
    settings = dataclasses.replace(
        check.with_their_slots(model.settings, other),
        model=dataclasses.replace(model.settings.model, dtype="float32"),
    )
    params = trained.on_one_device(model, settings)
    dtypes = {tensor.dtype for tensor in sources.hugging_face(other).tensors.values()}
    tolerance = tolerance or check.TOLERANCE
    try:
        result = check.directory(other, settings, params, "bfloat16" in dtypes | {trained.dtype(model)})
    except ValueError as error:
        print(f"check: {error}: NOT the same model")
        return EXIT_DIFFERENT
    same = result.largest <= tolerance * result.scale
    print(f"check: {result}; accepted is {tolerance:g}" + ("" if same else ": NOT the same model"))
    return 0 if same else EXIT_DIFFERENT


def _source(found: dict[str, Any]) -> Path:
    """A directory here, or one that a hub's name is fetched to.

    Raises:
      ValueError: neither.
    """
    text, revision = found["source"], found["revision"]
    path = Path(text).expanduser()
    if Path(text.partition("|")[0]).expanduser().exists():
        if revision:
            raise ValueError(
                f"--revision={revision}: accepted with a hub's name, and --source={text} is a directory here"
            )
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(
            f"--source={text}: nothing is there; accepted is a directory, or a hub's name such as google/switch-base-8"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"--source={text}: nothing is there, and to fetch it takes pip install '.[hf]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "spiece.model"]
    try:
        there = Path(snapshot_download(text, revision=revision or None, allow_patterns=patterns))
        if not any(there.glob("*.safetensors")):
            there = Path(
                snapshot_download(
                    text, revision=revision or None, allow_patterns=[*patterns, "pytorch_model*"]
                )
            )
        return there
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--source={text}: nothing is there, and it can't be fetched ({line})") from error


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def told(state: Any) -> AbstractContextManager:
    """A line of progress every ten seconds."""
    from switchmoe.data import progress

    return progress.told(note, "converting", state)


if __name__ == "__main__":
    exits.leave("experiments.convert", main)
