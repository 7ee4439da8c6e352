"""Any source of audio → rows with an id, undecoded audio, a duration from the header and, where known, a text."""

import logging
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
from datasets import Audio, ClassLabel, Dataset, Features, Value, concatenate_datasets, load_dataset
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from tqdm.auto import tqdm

from .audio import AudioError, read_duration
from .demo import load_demo
from .folders import AUDIO_SUFFIXES, audio_files, parquet_files, source_name, split_of

logger = logging.getLogger(__name__)

AUDIO = {"bytes": Value("binary"), "path": Value("string")}


def load_corpus(
    sources: str | list[str],
    split: str = "train",
    audio_column: str = "audio",
    text_column: str = "text",
    require_text: bool = False,
    label_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> Dataset:
    """Load one or several sources as rows `{"id", "audio": {"bytes", "path"}, "text", "duration"}`.

    Nothing is decoded: durations are read from file headers, or taken from a column `duration` where there is one. A
    file that is no audio is logged by name and left out.

    Args:
        sources: "demo" (the embedded corpus); a folder of audio files, with or without a metadata.csv or
            metadata.jsonl (columns `file_name` and `text`); a folder of parquet files, or one such file; or the name
            of a data set on the Hub, "user/name" or "user/name:config".
        split: which split. In a folder, sub-folders named train, validation, valid, val, dev, test or eval, and parquet
            files whose names begin so, are splits; what is in none of them is train.
        audio_column, text_column: the columns of parquet files, metadata and Hub data sets.
        require_text: fail if a source has no text column.
        label_column: a column with the class of every clip (speaker, keyword, language), which comes as column label.
        keep_columns: further columns to keep under their own names, as texts; None for the clips of a source that lacks
            one.

    Returns:
        `datasets.Dataset` with the columns id (all different), audio, text (None where there is none), duration
        (seconds) and, if asked for, label and others (string, None where there is none).

    Raises:
        FileNotFoundError: no such file or folder, or no audio in it.
        ValueError: a column or a split is missing; the message names those there are. Or a column to keep has the name
            of one that every corpus has.
    """
    if taken := sorted({"id", "audio", "text", "label", "duration"} & set(keep_columns)):
        raise ValueError(f"keep_columns: {', '.join(taken)} would hide a column that every corpus has: leave it out")
    sources = [sources] if isinstance(sources, str) else list(sources)
    parts = []
    for source in sources:
        rows = _load_source(source, split, audio_column, text_column, require_text, label_column, keep_columns)
        parts.append(_measure(_with_unique_ids(rows), source))
        logger.info("%s, split %s: %d clips", source_name(source), split, len(parts[-1]))
    corpus = concatenate_datasets(parts)
    if len(corpus) == 0:
        raise FileNotFoundError(
            f"no usable audio in split {split!r} of {', '.join(sources)}: see the skipped files above"
        )
    return _with_unique_ids(corpus)


def load_train_and_validation(
    sources: str | list[str],
    validation_fraction: float = 0.05,
    train_split: str = "train",
    validation_split: str = "validation",
    **columns,
) -> tuple[Dataset, Dataset]:
    """Load a split to train on and one to validate on; a source without the latter gives up a share of the former.

    Args:
        sources, columns: as for `load_corpus`.
        validation_fraction: the share of clips held out. Which clips is decided by a hash of their ids, so they stay
            held out when a folder grows.
        train_split, validation_split: names of the splits.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, found {validation_fraction}")
    train, validation = [], []
    for source in [sources] if isinstance(sources, str) else sources:
        corpus = load_corpus(source, train_split, **columns)
        if validation_split in corpus_splits(source):
            train.append(corpus)
            validation.append(load_corpus(source, validation_split, **columns))
        elif len(corpus) < 2:
            raise ValueError(
                f"{source} holds one clip only, and training and validation need one each: cut it in two files, or "
                "name another source beside it that has a validation split"
            )
        else:
            hashes = np.array([zlib.crc32(name.encode()) for name in corpus["id"]])
            held_out = hashes < max(validation_fraction * 2**32, hashes.min() + 1)
            if held_out.all():
                held_out = hashes == hashes.min()
            logger.info(
                "%s has no split %s: %d of %d clips are held out",
                source_name(source),
                validation_split,
                held_out.sum(),
                len(corpus),
            )
            train.append(corpus.select(np.flatnonzero(~held_out)))
            validation.append(corpus.select(np.flatnonzero(held_out)))
    return concatenate_datasets(train), concatenate_datasets(validation)


def corpus_splits(source: str) -> list[str]:
    """Names of the splits that a source has."""
    if source == "demo":
        return sorted(load_demo())
    if (path := _local_path(source)) is None:
        name, _, config = source.partition(":")
        return datasets.get_dataset_split_names(name, config or None)
    return sorted({split_of(name) for name in parquet_files(path) or audio_files(path)})


def _load_source(
    source: str,
    split: str,
    audio_column: str,
    text_column: str,
    require_text: bool,
    label_column: str | None,
    keep_columns: Sequence[str],
) -> Dataset:
    """Rows of one source: id, audio, text, what else is asked for, and duration where it is known already."""
    path = None if source == "demo" else _local_path(source)
    if path is not None and not parquet_files(path):
        labels = () if label_column is None else (label_column,)
        required = ((text_column,) if require_text else ()) + labels
        values = audio_files(path, (text_column, *labels, *keep_columns), required)
        names = _of_split(list(values), split, source)
        table = {
            "id": names,
            "audio": [{"bytes": None, "path": str(path / name)} for name in names],
            "text": [values[name][text_column] for name in names],
        }
        features = Features({"id": Value("string"), "audio": AUDIO, "text": Value("string")})
        for column, name_in_source in _further_columns(label_column, keep_columns).items():
            table[column] = [values[name][name_in_source] for name in names]
            features[column] = Value("string")
        return Dataset.from_dict(table, features=features).cast_column("audio", Audio(decode=False))

    if source == "demo":
        splits = load_demo()
        if split not in splits:
            raise ValueError(_no_split(source, split, splits))
        dataset = splits[split]
    elif path is not None:
        names = _of_split(parquet_files(path), split, source)
        files = [str(path / name) if path.is_dir() else str(path) for name in names]
        dataset = load_dataset("parquet", data_files=files, split="train")
    else:
        name, _, config = source.partition(":")
        try:
            dataset = load_dataset(name, config or None, split=split)
        except ConnectionError as error:
            raise FileNotFoundError(f"no folder {source} here, and the Hub cannot be reached: {error}") from error
    columns = ", ".join(dataset.column_names)
    if audio_column not in dataset.column_names:
        raise ValueError(f"{source} has no column {audio_column!r}; it has {columns}: set audio_column")
    if require_text and text_column not in dataset.column_names:
        raise ValueError(f"{source} has no column {text_column!r}; it has {columns}: set text_column")
    if label_column is not None and label_column not in dataset.column_names:
        raise ValueError(f"{source} has no column {label_column!r}; it has {columns}: set label_column")
    feature = dataset.features[audio_column]
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    if not is_struct and not isinstance(feature, Audio):
        raise ValueError(f"{source}: the column {audio_column!r} holds {feature}, expected audio (bytes and path)")
    return _standard_columns(dataset, audio_column, text_column, _further_columns(label_column, keep_columns))


def _further_columns(label_column: str | None, keep_columns: Sequence[str]) -> dict[str, str]:
    """Where the columns that were asked for come from, by their names in the corpus."""
    labels = {} if label_column is None else {"label": label_column}
    return labels | {column: column for column in keep_columns}


def _standard_columns(dataset: Dataset, audio_column: str, text_column: str, further: dict[str, str]) -> Dataset:
    """The columns id, audio, text, those asked for, and duration if there is one; audio is not decoded."""
    dataset = dataset.cast_column(audio_column, Audio(decode=False))
    columns = dataset.column_names
    paths = pyarrow.compute.struct_field(dataset.data.column(audio_column), "path").to_pylist()
    names = dataset["id"] if "id" in columns else [Path(path or "").name for path in paths]
    texts = dataset[text_column] if text_column in columns else [None] * len(dataset)
    texts = [None if text is None else str(text) for text in texts]
    seconds = _trusted_durations(dataset, audio_column)
    rows = dataset.select_columns(audio_column)
    if audio_column != "audio":
        rows = rows.rename_column(audio_column, "audio")
    rows = rows.add_column("id", [str(name or number) for number, name in enumerate(names)], feature=Value("string"))
    rows = rows.add_column("text", texts, feature=Value("string"))
    for column, name_in_source in further.items():
        values = dataset[name_in_source][:] if name_in_source in columns else [None] * len(dataset)
        if isinstance(dataset.features.get(name_in_source), ClassLabel):
            names = dataset.features[name_in_source].names
            values = [None if value is None else names[value] for value in values]
        values = [None if value is None else str(value) for value in values]
        rows = rows.add_column(column, values, feature=Value("string"))
    if seconds is not None:
        rows = rows.add_column("duration", seconds, feature=Value("float64"))
    return rows


def _trusted_durations(dataset: Dataset, audio_column: str) -> list[float] | None:
    """The column duration, if there is one and the headers of a few clips agree that it is in seconds."""
    if "duration" not in dataset.column_names:
        return None
    seconds = dataset["duration"][:]
    if not all(isinstance(value, int | float) and value > 0 for value in seconds):
        return None
    for row in np.linspace(0, len(seconds) - 1, num=min(3, len(seconds)), dtype=int):
        try:
            measured = read_duration(dataset[int(row)][audio_column])
        except AudioError:
            continue
        if abs(measured - seconds[row]) > 0.1 + 0.05 * measured:
            logger.warning(
                "the column duration says %g where a clip is %g s long: durations are read from the audio instead",
                seconds[row],
                measured,
            )
            return None
    return [float(value) for value in seconds]


def _with_unique_ids(rows: Dataset) -> Dataset:
    """Rows whose ids are all different: where they are not, their number is added."""
    names = rows["id"][:]
    if len(set(names)) == len(names):
        return rows
    unique = [f"{name}#{number}" for number, name in enumerate(names)]
    columns = rows.column_names
    return rows.remove_columns("id").add_column("id", unique, feature=Value("string")).select_columns(columns)


def _measure(rows: Dataset, source: str) -> Dataset:
    """Add the column duration, from headers, and leave out what is no audio."""
    problems = {}
    if "duration" not in rows.column_names:

        def measure(number: int) -> float:
            try:
                return read_duration(rows[number]["audio"])
            except AudioError as error:
                problems[number] = error
                return 0.0

        with ThreadPoolExecutor() as pool:
            numbers = tqdm(
                range(len(rows)), desc=f"durations of {source_name(source)}", unit="clip", disable=len(rows) < 2000
            )
            seconds = list(pool.map(measure, numbers))
        rows = rows.add_column("duration", seconds, feature=Value("float64"))
    if problems:
        logger.warning("skipped %d of %d files of %s:", len(problems), len(rows), source_name(source))
        for number in sorted(problems):
            logger.warning("skipped %s: %s", rows[number]["id"], problems[number])
        rows = rows.select([number for number in range(len(rows)) if number not in problems])
    first = [column for column in ("id", "audio", "text") if column in rows.column_names]
    further = [column for column in rows.column_names if column not in (*first, "duration")]
    return rows.select_columns([*first, *further, "duration"])


def _local_path(source: str) -> Path | None:
    """The path that a source names; for a Hub data set of audio files its download; for others on the Hub None."""
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"{source} is a file: expected a folder, a .parquet file or a Hub data set")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", source):
        raise FileNotFoundError(f"no folder or file {source}; a Hub data set is named user/name or user/name:config")
    try:
        files = HfApi().list_repo_files(source, repo_type="dataset") if ":" not in source else []
    except OfflineModeIsEnabled:
        files = []
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {source} here, and no such data set to be had from the Hub: {error}"
        ) from error
    if any(Path(file).suffix.lower() in AUDIO_SUFFIXES for file in files):
        return Path(snapshot_download(source, repo_type="dataset"))
    return None


def _of_split(names: list[str], split: str, source: str) -> list[str]:
    chosen = [name for name in names if split_of(name) == split]
    if not chosen:
        raise ValueError(_no_split(source, split, {split_of(name) for name in names}))
    return chosen


def _no_split(source: str, split: str, splits) -> str:
    return f"{source} has no split {split!r}; it has {', '.join(sorted(splits))}"
