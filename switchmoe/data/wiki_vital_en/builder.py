"""tfds builder of the embedded corpus; importing this module registers `wiki_vital_en` with tfds."""

import hashlib
import json
import lzma
from collections.abc import Iterator
from importlib import resources

import tensorflow_datasets as tfds

VALIDATION_SHARE = 0.05


def split_of(title: str) -> str:
    """`train` or `validation` by a hash of the title, the same on every machine and for every order."""
    fraction = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") / 2**64
    return "validation" if fraction < VALIDATION_SHARE else "train"


def records() -> Iterator[dict[str, str]]:
    """The packaged records as they are stored: title, text, topic, short."""
    packed = resources.files("switchmoe.data.wiki_vital_en").joinpath("wiki_vital_en.jsonl.xz")
    with packed.open("rb") as file, lzma.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


class WikiVitalEn(tfds.core.GeneratorBasedBuilder):
    """Summaries of the English Wikipedia's vital articles, level 4."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        fields = ("title", "text", "topic", "description")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Opening summaries of 10,014 vital articles (level 4) of the English Wikipedia.",
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields}),
            homepage="https://en.wikipedia.org/wiki/Wikipedia:Vital_articles/Level/4",
            license="CC BY-SA 4.0, Wikipedia contributors",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for record in records():
            if split_of(record["title"]) == split:
                description = record.pop("short")
                yield record["title"], record | {"description": description}
