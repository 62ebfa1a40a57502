"""Corpora behind one config field: the embedded one, any prepared tfds dataset, local files.

``load`` gives a random-access sequence of documents, which grain shuffles and slices. What cannot be
read is a ``DataError`` of one line that names the config field, its value and what would be accepted.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from switchmoe.data import local_files
from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

EMBEDDED = "wiki_vital_en"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Random-access documents, usable as a grain source.

    ``records`` holds strings, or mappings whose ``text_field`` holds the text as str or UTF-8 bytes.
    ``fingerprint`` changes when the corpus does; ``directory`` is where the corpus is.
    """

    records: Sequence[Any] = dataclasses.field(repr=False)
    fingerprint: str
    directory: str
    text_field: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        try:
            record = self.records[index]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"the corpus in {self.directory} cannot be read at record {index} ({_first_line(error)}); accepted is a "
                "complete one: delete it and prepare it again"
            ) from error
        text = record[self.text_field] if self.text_field else record
        if isinstance(text, str):
            return text
        if not isinstance(text, bytes):
            raise DataError(f"data.text_field={self.text_field}: not text, but {type(text).__name__}")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"record {index} of the corpus in {self.directory} is not UTF-8: {error}"
            ) from error


def load(settings: DataSettings, split: str) -> Documents:
    """The documents of one split of ``settings.source``.

    ``wiki_vital_en`` is the embedded corpus, prepared in ``data_dir`` on first use. A value ending in
    .txt or .jsonl (also .gz, .xz) is a glob of local files, split by a hash of the document. Anything
    else is a tfds dataset, prepared as array_record in ``data_dir``, whose held-out split is
    `validation`, or `test` where it has none.

    Args:
      settings: source, data_dir, text_field, documents and validation_share are read.
      split: `train` or `validation`.

    Raises:
      DataError: the corpus cannot be found, read or split, or is empty.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split={split}: accepted is one of train, validation")
    if settings.source.endswith(local_files.SUFFIXES):
        texts, directory = local_files.read(settings, split)
        return Documents(texts, fingerprint(texts), directory)
    return _load_tfds(settings, split)


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
            f"data.data_dir={data_dir}: {EMBEDDED} cannot be prepared there ({_first_line(error)}); "
            "accepted is a directory that can be written, with 20 MB free"
        ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _default_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "switchmoe")


def _load_tfds(settings: DataSettings, split: str) -> Documents:
    from google.protobuf import json_format

    name, data_dir = settings.source, os.path.expanduser(cache_directory(settings))
    try:
        if name == EMBEDDED:
            if "://" in data_dir:  # too small to be worth a bucket
                data_dir = _default_cache()
            prepare_embedded(data_dir)
        builder = _builder(name, data_dir)
        source, split_name = _open(builder, settings, split)
    except ImportError as error:
        raise DataError(
            f"data.source={name}: a package is missing ({_first_line(error)}); accepted is an "
            "environment with tensorflow-datasets and array-record, and gcsfs for gs:// directories"
        ) from error
    except json_format.ParseError as error:
        raise DataError(
            f"data.source={name}: the description of the dataset in {data_dir} is damaged ({_first_line(error)}); accepted "
            "is a complete dataset: delete it and prepare it again"
        ) from error
    if not len(source):
        raise DataError(f"data.source={name}: its split {split_name} is empty")
    features = list(source.dataset_info.features)
    if settings.text_field not in features:
        raise DataError(
            f"data.text_field={settings.text_field}: not a field of {name}; "
            f"accepted is one of {', '.join(features)}"
        )
    identity = f"{builder.info.full_name} {split_name} {len(source)} {builder.info.dataset_size}"
    documents = Documents(
        source, fingerprint([identity, settings.text_field]), str(builder.data_path), settings.text_field
    )
    documents[0]  # a damaged file shows here, not in the middle of something else
    return documents


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    def build() -> Any:
        return tfds.builder(name, data_dir=data_dir)

    try:
        try:
            return build()
        except tfds.core.DatasetNotFoundError:
            # Without TensorFlow tfds does not import the modules that register c4, wikipedia, ...
            module = name.split("/")[0].split(":")[0]
            root = pathlib.Path(tfds.__file__).parent
            found = [*root.glob(f"*/{module}.py"), *root.glob(f"*/{module}/__init__.py")]
            for path in found:
                parts = path.relative_to(root.parent).with_suffix("").parts
                importlib.import_module(".".join(part for part in parts if part != "__init__"))
            if found:
                return build()
            raise
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        reason = _first_line(error).split(". Here are")[0]
        raise DataError(
            f"data.source={name}: {reason}; accepted is {EMBEDDED}, a tfds name such as c4/en that is "
            f"known to tfds or prepared in data.data_dir={data_dir}, or a glob ending in "
            f"{', '.join(local_files.SUFFIXES)}"
        ) from error


def _open(builder: Any, settings: DataSettings, split: str) -> tuple[Any, str]:
    """Returns the data source of the split, and the name that the split has in the dataset."""
    names = list(builder.info.splits) or [split]  # none: not prepared, or tfds's mock data
    candidates = ("validation", "test") if split == "validation" else (split,)
    name = next((candidate for candidate in candidates if candidate in names), None)
    if name is None:
        raise DataError(
            f"data.source={settings.source}: has the splits {', '.join(names)}; accepted is a dataset "
            f"with a split {' or '.join(candidates)}"
        )
    try:
        return builder.as_data_source(name, file_format="array_record"), name
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
                f"{builder.data_path} is incomplete or damaged ({_first_line(error)}); accepted is a complete "
                "dataset: delete it and prepare it again"
            )
        raise DataError(f"data.source={settings.source}: {problem}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fingerprint(texts: Sequence[str]) -> str:
    """A SHA-256 that changes when any text, their number or their order does."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
