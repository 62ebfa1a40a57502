"""Our vocabularies as a `tokenizer.json`, which `AutoTokenizer` and servers read."""

import base64
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as proto

from switchmoe.data.vocabulary import BLANK, Vocabulary
from switchmoe.settings import NUM_SENTINELS

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def files(vocabulary: Vocabulary, first: int | None, last: int | None) -> dict[str, Any] | None:
    """The two files' contents by name; None of a model that is not unigram, which they would read otherwise.

    Args:
      first: the id that each text begins with; None: without.
      last: the id that each text ends with; None: without.
    """
    model = proto.ModelProto.FromString(vocabulary.model_bytes)
    if model.trainer_spec.model_type != proto.TrainerSpec.UNIGRAM:
        return None
    pieces = [(piece.piece, piece.score) for piece in model.pieces[: vocabulary.pieces]]
    sentinels = [(f"<extra_id_{NUM_SENTINELS - 1 - i}>", 0.0) for i in range(NUM_SENTINELS)]
    special = {i: pieces[i][0] for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id)}
    special |= {len(pieces) + i: name for i, (name, _) in enumerate(sentinels)}
    spec = model.normalizer_spec
    added = [
        {"id": i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in special.items()
    ]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(spec),
        "pre_tokenizer": _blanks(spec.add_dummy_prefix),
        "post_processor": _template({i: (*pieces, *sentinels)[i][0] for i in (first, last) if i is not None}, first, last),
        "decoder": {"type": "Sequence", "decoders": _decoders(spec.add_dummy_prefix)},
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.unk_id,
            "vocab": [*pieces, *sentinels],
            "byte_fallback": bool(vocabulary.byte_ids.size),
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": special[0], "eos_token": special[1], "unk_token": special[2],
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {FILE: whole, CONFIG: config}


def _normalizer(spec: Any) -> dict[str, Any] | None:
    parts: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        parts.append(
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode(),
            }
        )
    if spec.remove_extra_whitespaces:
        parts += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    return {"type": "Sequence", "normalizers": parts} if parts else None


def _blanks(prefix: bool) -> dict[str, Any]:
    scheme = "always" if prefix else "never"
    return {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": False}


def _decoders(prefix: bool) -> list[dict[str, Any]]:
    blanks = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    first = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}, *first]


def _template(named: dict[int, str], first: int | None, last: int | None) -> dict[str, Any] | None:
    if not named:
        return None

    def one(i: int | None) -> list[dict[str, Any]]:
        return [] if i is None else [{"SpecialToken": {"id": named[i], "type_id": 0}}]

    def text(name: str) -> list[dict[str, Any]]:
        return [*one(first), {"Sequence": {"id": name, "type_id": 0}}, *one(last)]

    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in named.items()}
    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": text("A") + text("B"),
        "special_tokens": tokens,
    }
