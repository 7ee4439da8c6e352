"""Any source of audio → rows with an id, undecoded audio, a duration from the header and, where known, a text."""

import csv
import json
import logging
import re
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
from datasets import Audio, Dataset, Features, Value, concatenate_datasets, load_dataset
from tqdm.auto import tqdm

from .audio import AudioError, read_duration
from .demo import load_demo

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
AUDIO = {"bytes": Value("binary"), "path": Value("string")}


def load_corpus(
    sources: str | list[str],
    split: str = "train",
    audio_column: str = "audio",
    text_column: str = "text",
    require_text: bool = False,
) -> Dataset:
    """Load one or several sources as rows `{"id", "audio": {"bytes", "path"}, "text", "duration"}`.

    Nothing is decoded: durations are read from file headers, or taken from a column `duration` where there is one. A
    file that is no audio is logged by name and left out.

    Args:
        sources: "demo" (the embedded corpus); a folder of audio files, with or without a metadata.csv or
            metadata.jsonl (columns `file_name` and `text`); a folder of parquet files, or one such file; or the name
            of a data set on the Hub, "user/name" or "user/name:config".
        split: which split. In a folder, the sub-folders (or the parquet files whose names begin with) train,
            validation, valid, dev and test are splits; what is in none of them is train.
        audio_column, text_column: the columns of parquet files, metadata and Hub data sets.
        require_text: fail if a source has no text column.

    Returns:
        `datasets.Dataset` with the columns id, audio, text (None where there is none) and duration (seconds).

    Raises:
        FileNotFoundError: no such file or folder, or no audio in it.
        ValueError: a column or a split is missing; the message names those there are.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    parts = [
        _measure(_load_source(source, split, audio_column, text_column, require_text), source) for source in sources
    ]
    corpus = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if len(corpus) == 0:
        raise FileNotFoundError(
            f"no usable audio in split {split!r} of {', '.join(sources)}: see the skipped files above"
        )
    return corpus


def load_train_and_validation(
    sources: str | list[str], validation_fraction: float = 0.05, **columns
) -> tuple[Dataset, Dataset]:
    """Load the splits train and validation; a source without validation gives up a share of its train split for it.

    Args:
        sources, columns: as for `load_corpus`.
        validation_fraction: the share of clips held out. Which clips is decided by a hash of their ids, so they stay
            held out when a folder grows.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, found {validation_fraction}")
    train, validation = [], []
    for source in [sources] if isinstance(sources, str) else sources:
        corpus = load_corpus(source, "train", **columns)
        if "validation" in corpus_splits(source):
            train.append(corpus)
            validation.append(load_corpus(source, "validation", **columns))
        elif len(corpus) < 2:
            raise ValueError(f"{source} holds one clip only: training and validation need one each")
        else:
            hashes = np.array([zlib.crc32(name.encode()) for name in corpus["id"]])
            held_out = hashes < max(validation_fraction * 2**32, hashes.min() + 1)
            if held_out.all():
                held_out = hashes == hashes.min()
            logger.info("%s has no validation split: %d of %d clips are held out", source, held_out.sum(), len(corpus))
            train.append(corpus.select(np.flatnonzero(~held_out)))
            validation.append(corpus.select(np.flatnonzero(held_out)))
    return concatenate_datasets(train), concatenate_datasets(validation)


def corpus_splits(source: str) -> list[str]:
    """Names of the splits that a source has."""
    if source == "demo":
        return ["train", "validation", "test"]
    if (path := _local_path(source)) is None:
        name, _, config = source.partition(":")
        return datasets.get_dataset_split_names(name, config or None)
    rows = _folder_rows(path) if path.is_dir() and not _parquet_files(path) else _parquet_files(path)
    return sorted({_split_of(row) for row in rows})


def _load_source(source: str, split: str, audio_column: str, text_column: str, require_text: bool) -> Dataset:
    path = None if source == "demo" else _local_path(source)
    if path is not None and path.is_dir() and not _parquet_files(path):
        rows = _folder_rows(path, text_column, require_text)
        if require_text and not any("text" in row for row in rows):
            raise ValueError(
                f"{source} has no texts: expected {' or '.join(METADATA_FILES)} in it, with the columns file_name "
                f"and {text_column}"
            )
        chosen = [row for row in rows if _split_of(row) == split]
        if not chosen:
            raise ValueError(_no_split(source, split, {_split_of(row) for row in rows}))
        table = {
            "id": [row["name"] for row in chosen],
            "audio": [{"bytes": None, "path": str(path / row["name"])} for row in chosen],
            "text": [row.get("text") for row in chosen],
        }
        features = Features({"id": Value("string"), "audio": AUDIO, "text": Value("string")})
        return Dataset.from_dict(table, features=features).cast_column("audio", Audio(decode=False))

    if source == "demo":
        splits = load_demo()
        if split not in splits:
            raise ValueError(_no_split(source, split, splits))
        dataset = splits[split]
    elif path is not None:
        files = _parquet_files(path)
        chosen = [str(path / row["name"]) if path.is_dir() else str(path) for row in files if _split_of(row) == split]
        if not chosen:
            raise ValueError(_no_split(source, split, {_split_of(row) for row in files}))
        dataset = load_dataset("parquet", data_files=chosen, split="train")
    else:
        name, _, config = source.partition(":")
        dataset = load_dataset(name, config or None, split=split)

    if audio_column not in dataset.column_names:
        raise ValueError(
            f"{source} has no column {audio_column!r}; it has {', '.join(dataset.column_names)}: set audio_column"
        )
    if require_text and text_column not in dataset.column_names:
        raise ValueError(
            f"{source} has no column {text_column!r}; it has {', '.join(dataset.column_names)}: set text_column"
        )
    return _standard_columns(dataset, audio_column, text_column)


def _standard_columns(dataset: Dataset, audio_column: str, text_column: str) -> Dataset:
    """The columns id, audio, text and, if it is there, duration; audio stays where it is and is not decoded."""
    dataset = dataset.cast_column(audio_column, Audio(decode=False))
    columns = dataset.column_names
    paths = pyarrow.compute.struct_field(dataset.data.column(audio_column), "path").to_pylist()
    names = dataset["id"] if "id" in columns else [Path(path or "").name for path in paths]
    texts = dataset[text_column] if text_column in columns else [None] * len(dataset)
    seconds = _trusted_durations(dataset, audio_column)
    rows = dataset.select_columns(audio_column)
    if audio_column != "audio":
        rows = rows.rename_column(audio_column, "audio")
    rows = rows.add_column("id", [str(name or number) for number, name in enumerate(names)], feature=Value("string"))
    rows = rows.add_column("text", list(texts), feature=Value("string"))
    if seconds is not None:
        rows = rows.add_column("duration", seconds, feature=Value("float64"))
    return rows


def _trusted_durations(dataset: Dataset, audio_column: str) -> list[float] | None:
    """The column duration, if there is one and the headers of a few clips agree that it is in seconds."""
    if "duration" not in dataset.column_names:
        return None
    seconds = [float(value or 0) for value in dataset["duration"]]
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
    return seconds


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
            numbers = tqdm(range(len(rows)), desc=f"durations of {source}", unit="clip", disable=len(rows) < 2000)
            seconds = list(pool.map(measure, numbers))
        rows = rows.add_column("duration", seconds, feature=Value("float64"))
    if problems:
        logger.warning("skipped %d of %d files of %s:", len(problems), len(rows), source)
        for number in sorted(problems):
            logger.warning("skipped %s: %s", rows[number]["id"], problems[number])
        rows = rows.select([number for number in range(len(rows)) if number not in problems])
    return rows.select_columns(["id", "audio", "text", "duration"])


def _local_path(source: str) -> Path | None:
    """The path that a source names, or None if it is the name of a Hub data set."""
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"{source} is a file: expected a folder, a .parquet file or a Hub data set")
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", source):
        return None
    raise FileNotFoundError(f"no folder or file {source}; a Hub data set is named user/name or user/name:config")


def _parquet_files(path: Path) -> list[dict]:
    if path.is_file():
        return [{"name": path.name}]
    return [{"name": str(file.relative_to(path))} for file in sorted(path.rglob("*.parquet"))]


def _split_of(row: dict) -> str:
    """The split of a file by the first part of its relative path; that of a parquet file also by its name."""
    name = row["name"]
    if "/" not in name and not name.endswith(".parquet"):
        return "train"
    return SPLITS.get(re.split(r"[/\-_.]", name)[0].lower(), "train")


def _folder_rows(folder: Path, text_column: str = "text", require_text: bool = False) -> list[dict]:
    """`{"name": relative path, "text"}` of all audio files below a folder, and of all that its metadata name."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    rows = {}
    for file in files:
        if file.suffix.lower() in AUDIO_SUFFIXES:
            name = file.relative_to(folder).as_posix()
            rows[name] = {"name": name}
    for file in files:
        if file.name in METADATA_FILES:
            for entry in _read_metadata(file, ["file_name", text_column] if require_text else ["file_name"]):
                name = (file.parent.relative_to(folder) / entry["file_name"]).as_posix()
                rows[name] = {"name": name, "text": entry.get(text_column)}
    if not rows:
        suffixes = Counter(file.suffix.lower() or file.name for file in files)
        found = ", ".join(f"{count} × {suffix}" for suffix, count in suffixes.most_common(5)) or "nothing"
        raise FileNotFoundError(
            f"no audio in {folder}: found {found}; expected {' '.join(sorted(AUDIO_SUFFIXES))} or .parquet"
        )
    return list(rows.values())


def _read_metadata(file: Path, required: list[str]) -> list[dict]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        entries = (
            list(csv.DictReader(stream))
            if file.suffix == ".csv"
            else [json.loads(line) for line in stream if line.strip()]
        )
    for column in required:
        if entries and column not in entries[0]:
            raise ValueError(f"{file} has no column {column!r}; it has {', '.join(entries[0])}")
    return entries


def _no_split(source: str, split: str, splits) -> str:
    return f"{source} has no split {split!r}; it has {', '.join(sorted(splits))}"
