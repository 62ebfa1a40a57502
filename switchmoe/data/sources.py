"""Corpora behind one config field: the embedded one, any prepared tfds dataset, local files.

``load_splits`` gives random-access sequences of documents, which grain shuffles and slices. What cannot be
read is a ``DataError`` of one line that names the config field, its value and what would be accepted.
"""

import array
import bisect
import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from switchmoe.data import local_files, prepared
from switchmoe.data.errors import DataError
from switchmoe.data.prepared import fingerprint
from switchmoe.data.progress import Note, told
from switchmoe.settings import DataSettings

EMBEDDED = "wiki_vital_en"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Random-access documents, usable as a grain source.

    ``records`` holds strings, or mappings whose ``text_field`` holds the text as str or UTF-8 bytes.
    ``fingerprint`` changes when the corpus does; ``directory`` is where the corpus is. ``parts`` has the numbers of the
    documents of each part of a mixture (`data.parts`), by its name.
    """

    records: Sequence[Any] = dataclasses.field(repr=False)
    fingerprint: str
    directory: str
    text_field: str = ""
    parts: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        try:
            record = self.records[index]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"the corpus in {self.directory} cannot be read at record {index} ({first_line(error)}); accepted is a "
                "complete one: delete it and prepare it again"
            ) from error
        text = record[self.text_field] if self.text_field else record
        if isinstance(text, str):
            return text
        if not isinstance(text, bytes):
            raise DataError(
                f"data.text_field={self.text_field}: not text, but {type(text).__name__}; accepted is a field of text"
            )
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"record {index} of the corpus in {self.directory} is not UTF-8: {error}"
            ) from error


def load(settings: DataSettings, split: str, note: Note = lambda _: None) -> Documents:
    """The documents of one split, `train` or `validation`: see `load_splits`."""
    if split not in prepared.SPLITS:
        raise DataError(f"split={split}: accepted is one of {', '.join(prepared.SPLITS)}")
    if local_files.is_local(settings.source):
        return _checked(_local(settings, note), settings)[split]
    return _load_tfds(settings, split, note)


def load_splits(settings: DataSettings, note: Note = lambda _: None) -> dict[str, Documents]:
    """The documents of both splits of ``settings.source``, which is read once.

    ``wiki_vital_en`` is the embedded corpus, prepared in ``data_dir`` on first use. A glob is of local files (see
    `local_files.ACCEPTED`), split by a hash of the document. Anything else is a tfds dataset, prepared as array_record
    in ``data_dir``: `data.train_split` and `data.validation_split` of it, or `train` and `validation` or `test`, or where it
    has only `train`, documents of that by their hash.

    Args:
      note: told of what takes long.

    Raises:
      DataError: the corpus cannot be found, read or split, or is empty.
    """
    if local_files.is_local(settings.source):
        return _checked(_local(settings, note), settings)
    return {split: _load_tfds(settings, split, note) for split in prepared.SPLITS}


def load_whole(settings: DataSettings, note: Note = lambda _: None) -> Sequence[str]:
    """All documents of ``settings.source``, held out or not, the held-out ones last: a text to measure a model on.

    Raises:
      DataError: as `load_splits`; there is no document.
    """
    parts = _local(settings, note) if local_files.is_local(settings.source) else load_splits(settings, note)
    return _Joined(list(parts.values()))


class _Joined(Sequence):
    """Parts one after another, of which each document is read when it is asked for."""

    def __init__(self, parts: Sequence[Sequence[str]]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def _local(settings: DataSettings, note: Note) -> dict[str, Documents]:
    for field in ("train_split", "validation_split"):
        if getattr(settings, field):
            raise DataError(
                f"data.{field}={getattr(settings, field)}: accepted with local files is '' (data.validation_share splits them)"
            )
    cache = _local_cache(settings)
    paths = local_files.paths(settings.source)
    names = local_files.part_names(paths, settings) if settings.parts else []
    directory = os.path.dirname(os.path.abspath(paths[0]))
    found = {}
    for name, split in prepared.splits(settings, cache, note).items():
        parts = dict(zip(names, split.files, strict=True)) if names else {}
        sizes = [f"{part} {len(numbers)}" for part, numbers in parts.items()]
        sign = fingerprint([split.fingerprint, *sizes]) if parts else split.fingerprint
        found[name] = Documents(split.records, sign, directory, parts=parts)
    return found


def _checked(found: dict[str, Documents], settings: DataSettings) -> dict[str, Documents]:
    empty = [name for name, documents in found.items() if not len(documents)]
    if empty:
        raise DataError(
            f"data.validation_share={settings.validation_share}: leaves no {empty[0]} document of the"
            f" {sum(map(len, found.values()))} in {settings.source}; accepted is a share that leaves some on both sides, or more"
            " documents (data.documents says what a document is)"
        )
    for split, documents in found.items():
        missing = [part for part, numbers in documents.parts.items() if not len(numbers)]
        if missing:
            raise DataError(
                f"data.parts={settings.parts}: {missing[0]} has no {split} document; accepted are files with documents on both"
                " sides of data.validation_share"
            )
    return found


def part(documents: Documents, name: str) -> Documents:
    """The documents of one part of a mixture."""
    records = prepared.Reordered(documents.records, documents.parts[name])
    return dataclasses.replace(documents, records=records, parts={})


def cache_directory(settings: DataSettings) -> str:
    """``data_dir`` (which may be a bucket), or `$XDG_CACHE_HOME/switchmoe`, or `~/.cache/switchmoe`."""
    return settings.data_dir or _default_cache()


def prepare_embedded(data_dir: str) -> None:
    """Prepares the embedded corpus in ``data_dir``, unless it is there.

    It is made in a temporary directory and renamed: a process that is killed, or two that prepare at
    the same time, leave the corpus complete or absent.

    Raises:
      DataError: ``data_dir`` cannot be written, or a package is missing.
    """
    import tensorflow_datasets as tfds

    from switchmoe.data.wiki_vital_en import builder

    temporary = None
    try:
        final = builder.WikiVitalEn(data_dir=data_dir, file_format="array_record").data_path
        complete = final / "dataset_info.json"
        if complete.exists():
            return
        os.makedirs(final.parent, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=data_dir, prefix=f".{EMBEDDED}-")
        making = builder.WikiVitalEn(data_dir=temporary, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            making.download_and_prepare(
                download_dir=os.path.join(temporary, "downloads"),
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        try:
            os.rename(making.data_path, final)
        except OSError:
            if not complete.exists():  # else another process was faster
                raise
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.data_dir={data_dir}: {EMBEDDED} cannot be prepared there ({first_line(error)}); "
            "accepted is a directory that can be written, with 20 MB free"
        ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _default_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # as its specification has it
        home = os.path.expanduser("~/.cache")
    return os.path.join(home, "switchmoe")


def _local_cache(settings: DataSettings) -> str:
    """Where what is prepared lies: `data.data_dir`, or the default cache where that is a bucket."""
    directory = os.path.expanduser(cache_directory(settings))
    return _default_cache() if "://" in directory else directory


def _load_tfds(settings: DataSettings, split: str, note: Note) -> Documents:
    from google.protobuf import json_format

    for field in ("parts", "split_field"):
        if value := getattr(settings, field):
            raise DataError(f"data.{field}={value}: accepted with {settings.source} is '', or local files")

    name, data_dir = settings.source, os.path.expanduser(cache_directory(settings))
    try:
        if name == EMBEDDED:
            data_dir = _local_cache(settings)  # too small to be worth a bucket
            prepare_embedded(data_dir)
        try:
            builder = tfds_builder(name, data_dir)
        except (ValueError, AssertionError, RuntimeError, OSError) as error:
            raise DataError(
                f"data.source={name}: {first_line(error)}; accepted is {EMBEDDED}, a tfds name such as c4/en that is "
                f"known to tfds or prepared in data.data_dir={data_dir}, or a glob ending in "
                f"{local_files.ACCEPTED}"
            ) from error
        source, split_name, held_out = _open(builder, settings, split)
    except ImportError as error:
        raise DataError(
            f"data.source={name}: a package is missing ({first_line(error)}); accepted is an "
            "environment with tensorflow-datasets and array-record, and gcsfs for gs:// directories"
        ) from error
    except json_format.ParseError as error:
        raise DataError(
            f"data.source={name}: the description of the dataset in {data_dir} is damaged ({first_line(error)}); accepted "
            "is a complete dataset: delete it and prepare it again"
        ) from error
    if not len(source):
        raise DataError(
            f"data.source={name}: its split {split_name} is empty; accepted is one with documents"
        )
    features = list(source.dataset_info.features)
    if settings.text_field not in features:
        raise DataError(
            f"data.text_field={settings.text_field}: not a field of {name}; "
            f"accepted is one of {', '.join(features)}"
        )
    identity = f"{builder.info.full_name} {split_name} {len(source)} {builder.info.dataset_size}"
    directory = str(builder.data_path)
    documents = Documents(
        source, fingerprint([identity, settings.text_field]), directory, settings.text_field
    )
    documents[0]  # a damaged file shows here, not in the middle of something else
    if held_out:
        parts = [identity, settings.text_field, str(settings.validation_share)]
        orders = _by_hash(documents, settings, note)
        chosen = prepared.Reordered(source, orders[split])
        documents = Documents(chosen, fingerprint([*parts, split]), directory, settings.text_field)
        _checked({split: documents}, settings)
    return documents


def _by_hash(documents: Documents, settings: DataSettings, note: Note) -> dict[str, np.ndarray]:
    """The numbers of the documents of each split, for a dataset that has one alone; every text is read once, ever."""
    key = fingerprint([documents.fingerprint, str(settings.validation_share)])[:16]
    path = pathlib.Path(_local_cache(settings)) / "prepared" / f"split-{key}.npz"
    try:
        with np.load(path) as found:
            return dict(found)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    places = array.array("d")
    with told(
        note, f"splitting {settings.source}", lambda: f"{len(places):,} of {len(documents):,} documents"
    ):
        for index in range(len(documents)):
            places.append(local_files.fraction(documents[index]))
    orders = prepared.order(np.array(places), settings.validation_share)
    with contextlib.suppress(OSError):  # then it is done again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(temporary, **orders)
        temporary.replace(path)
    return orders


def tfds_builder(name: str, data_dir: str) -> Any:
    """Raises what tfds does, ValueError, AssertionError, RuntimeError or OSError, where it knows no such data set."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # Without TensorFlow tfds does not import the modules that register c4, wikipedia, ...
        module = name.split("/")[0].split(":")[0]
        root = pathlib.Path(tfds.__file__).parent
        found = [*root.glob(f"*/{module}.py"), *root.glob(f"*/{module}/__init__.py")]
        for path in found:
            parts = path.relative_to(root.parent).with_suffix("").parts
            importlib.import_module(".".join(part for part in parts if part != "__init__"))
        if found:
            return tfds.builder(name, data_dir=data_dir)
        raise


def _open(builder: Any, settings: DataSettings, split: str) -> tuple[Any, str, bool]:
    """Returns (data source, name of its split in the dataset, whether it is to be split by hash)."""
    names = list(builder.info.splits) or [split]  # none: not prepared, or tfds's mock data
    train, held_out = settings.train_split or "train", settings.validation_split
    has = next((name for name in ("validation", "test") if name in names), "")
    by_hash = not (held_out or has) and builder.info.splits
    name = train if split == "train" or by_hash else held_out or has or split
    if name == "train" not in names:
        raise DataError(
            f"data.source={settings.source}: has the splits {', '.join(names)}; accepted is a dataset "
            "with a split train, or data.train_split"
        )
    _check_apart(builder, settings, train, held_out or has)
    try:
        return builder.as_data_source(name, file_format="array_record"), name, bool(by_hash)
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        if not builder.info.splits:
            problem = (
                f"not prepared in {builder.data_path}; prepare it as array_record: tfds build "
                f"{settings.source} --file_format=array_record --data_dir={cache_directory(settings)}"
            )
        elif "array_record" not in {known.value for known in builder.info.available_file_formats()}:
            problem = (
                f"{builder.data_path} holds {builder.info.file_format.value}; accepted is array_record: tfds "
                f"convert_format --dataset_dir={builder.data_path} --out_file_format=array_record"
            )
        else:
            problem = (
                f"{builder.data_path} is incomplete or damaged ({first_line(error)}); accepted is a complete "
                "dataset: delete it and prepare it again"
            )
        raise DataError(f"data.source={settings.source}: {problem}") from error


def _check_apart(builder: Any, settings: DataSettings, train: str, held_out: str) -> None:
    """Refuses splits that tfds can't read, or that share documents."""
    import tensorflow_datasets as tfds

    parts = {}
    for field, name in (("train_split", train), ("validation_split", held_out)):
        if not name or not builder.info.splits:
            continue
        try:
            found = tfds.core.ReadInstruction.from_spec(name).to_absolute(builder.info.splits)
        except (ValueError, AssertionError, KeyError) as error:
            raise DataError(
                f"data.{field}={name}: {first_line(error)}; accepted is one of {', '.join(builder.info.splits)}, or a part"
                " as train[:90%]"
            ) from error
        sizes = {one.splitname: builder.info.splits[one.splitname].num_examples for one in found}
        parts[field] = [
            (one.splitname, one.from_ or 0, sizes[one.splitname] if one.to is None else one.to)
            for one in found
        ]
    for name, first, last in parts.get("train_split", ()):
        for other, other_first, other_last in parts.get("validation_split", ()):
            if name == other and max(first, other_first) < min(last, other_last):
                raise DataError(
                    f"data.validation_split={held_out}: shares documents with data.train_split={train}; accepted are parts"
                    " without common documents, as train[:90%] and train[90%:]"
                )


def first_line(error: Exception) -> str:
    """What an error says, without tfds's list of all data sets."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". Here are")[0]
