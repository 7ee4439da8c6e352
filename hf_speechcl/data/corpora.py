"""Any source of audio → rows with an id, undecoded audio, a duration from the header and, where known, a text."""

import glob
import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Audio, Dataset, concatenate_datasets, load_dataset
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from pyarrow import compute

from .columns import Columns, beside, column_of, describe_lists, standard_columns, table_of
from .demo import load_demo
from .folders import AUDIO_SUFFIXES, Files, list_files, relative_to, source_name, split_of
from .index import indexed_durations

logger = logging.getLogger(__name__)


def load_corpus(
    sources: str | list[str],
    split: str = "train",
    audio_column: str = "audio",
    text_column: str = "text",
    require_text: bool = False,
    label_column: str | None = None,
    keep_columns: Sequence[str] = (),
    list_columns: Mapping[str, pyarrow.DataType] | None = None,
    skipped: list[str] | None = None,
) -> Dataset:
    """Load one or several sources as rows `{"id", "audio": {"bytes", "path"}, "text", "duration"}`.

    Nothing is decoded: durations are taken from a column `duration` where there is one, or read from file headers and
    kept for the next time (see index.py). A file that is no audio is logged by name and left out.

    Args:
        sources: "demo" (the embedded corpus); a folder of audio files, with or without a metadata.csv or
            metadata.jsonl (columns `file_name` and `text`); a folder of parquet files, or one such file; or the name
            of a data set on the Hub, "user/name" or "user/name:config".
        split: which split. In a folder, sub-folders named train, validation, valid, val, dev, test or eval, or so and
            more behind - or a point (dev-clean), and parquet files whose names begin so, are splits. Audio that is in
            none of them is of the split in whose sub-folder the metadata file lies that names it, or else train. Audio
            outside is judged by its path from the folder.
        audio_column, text_column: the columns of parquet files, metadata and Hub data sets.
        require_text: fail if a source has no text column.
        label_column: a column with the class of every clip (speaker, keyword, language), which comes as column label.
        keep_columns: further columns to keep under their own names, as texts; None for the clips of a source that lacks
            one.
        list_columns: columns that hold a list for every clip, with the type of its elements, which come as such lists;
            of parquet files and Hub data sets only.
        skipped: where to add the ids of clips that are left out as they cannot be read.

    Returns:
        `datasets.Dataset` with the columns id (all different), audio, text (None where there is none), duration
        (seconds) and, if asked for, label and others (string, None where there is none).

    Raises:
        FileNotFoundError: no such file or folder, or no audio in it.
        ValueError: a column or a split is missing; the message names those there are. Or a column to keep has the name
            of one that every corpus has, or a column of lists holds none.
    """
    columns = Columns(audio_column, text_column, require_text, label_column, tuple(keep_columns), list_columns or {})
    sources = [sources] if isinstance(sources, str) else list(sources)
    return _join([_load(_open(source, columns), split, columns) for source in sources], split, sources, skipped)


def load_train_and_validation(
    sources: str | list[str],
    validation_fraction: float = 0.05,
    train_split: str = "train",
    validation_split: str = "validation",
    scored_by: str | None = None,
    **columns,
) -> tuple[Dataset, Dataset]:
    """Load a split to train on and one to validate on; a source without the latter gives up a share of the former.

    Args:
        sources, columns: as for `load_corpus`.
        validation_fraction: the share of clips held out. Which clips is decided by a hash of their ids, so they stay
            held out when a folder grows.
        scored_by: text or label, of the columns below, where only clips with one are to be held out.
        train_split, validation_split: names of the splits.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, found {validation_fraction}")
    columns = Columns(**columns)
    train, validation = [], []
    for name in [sources] if isinstance(sources, str) else sources:
        source = _open(name, columns)
        corpus = _join([_load(source, train_split, columns)], train_split, [name])
        if validation_split.partition("[")[0] in source.splits:  # of the Hub also a part, validation[:10%]
            train.append(corpus)
            rows = _load(source, validation_split, columns)
            validation.append(_join([rows], validation_split, [name]))
        else:
            held_out = _held_out(corpus, name, validation_fraction, scored_by)
            logger.info(
                "%s has no split %s: %d of %d clips are held out",
                source_name(name),
                validation_split,
                held_out.sum(),
                len(corpus),
            )
            train.append(corpus.select(np.flatnonzero(~held_out)))
            validation.append(corpus.select(np.flatnonzero(held_out)))
    return concatenate_datasets(train), concatenate_datasets(validation)


def _held_out(corpus: Dataset, name: str, share: float, scored_by: str | None) -> np.ndarray:
    """Which clips of a source are for validation."""
    can_be = np.ones(len(corpus), bool)
    if scored_by is not None:
        can_be = np.array([bool(value) for value in column_of(corpus, scored_by).to_pylist()])
    if not can_be.any():  # whoever asked for them says so
        can_be[:] = True
    if can_be.sum() < 2:
        raise ValueError(
            f"{name} holds one clip only{f' with a {scored_by}' if len(corpus) > 1 else ''}, and training and "
            "validation need one each: cut it in two files, or name another source beside it that has a validation "
            "split"
        )
    hashes = np.array([zlib.crc32(id.encode()) for id in column_of(corpus, "id").to_pylist()])
    lowest = hashes[can_be].min()
    held_out = can_be & (hashes < max(share * 2**32, lowest + 1))
    return can_be & (hashes == lowest) if held_out[can_be].all() else held_out


def corpus_splits(source: str) -> list[str]:
    """Names of the splits that a source has."""
    return _open(source, Columns()).splits


@dataclass(frozen=True)
class _Source:
    """A source that was looked at once: its files, if it is a folder, and for audio files what their metadata say."""

    name: str
    files: Files | None = None
    values: dict[str, pyarrow.Array] | None = None
    stated_splits: dict[str, str] = field(default_factory=dict)

    @cached_property
    def split_of_file(self) -> np.ndarray:
        names = self.files.names.to_pylist()
        splits = (self.stated_splits.get(name) or split_of(relative_to(self.files.folder, name)) for name in names)
        return np.array([*splits], dtype=object)

    @cached_property
    def splits(self) -> list[str]:
        if self.name == "demo":
            return sorted(load_demo())
        if self.files is None:
            name, _, config = self.name.partition(":")
            return datasets.get_dataset_split_names(name, config or None)
        return sorted(set(self.split_of_file))


def _open(name: str, columns: Columns) -> _Source:
    path = None if name == "demo" else _local_path(name)
    if path is None:
        return _Source(name)
    return _Source(name, *list_files(path, tuple(dict.fromkeys(columns.texts.values())), columns.required))


def _load(source: _Source, split: str, columns: Columns) -> Dataset:
    """Rows of a split of a source, with null for the duration of clips that cannot be used."""
    if source.files is None:
        rows = standard_columns(_load_named(source.name, split), source.name, columns)
        files, clips = _files_in_cache(rows, split), np.array([len(rows)])
    elif split not in source.splits:
        raise ValueError(_no_split(source.name, split, source.splits))
    elif source.values is not None and columns.list_columns:
        raise ValueError(
            f"{source.name} is a folder of audio files, and {describe_lists(columns)} are lists, which metadata do "
            "not hold: give parquet files"
        )
    else:
        numbers = np.flatnonzero(source.split_of_file == split)
        files, clips = source.files.select(numbers), np.ones(len(numbers), int)
        if source.values is not None:
            texts = {column: source.values[name].take(pyarrow.array(numbers)) for column, name in columns.texts.items()}
            rows = _audio_rows(files, texts)
        else:
            paths = {str(files.folder / name): _footer(files.folder / name) for name in files.names.to_pylist()}
            rows = _parquet_rows(paths, source.name, columns)
            clips = np.array([footer.num_rows for footer in paths.values()])
    rows = _with_unique_ids(rows)
    if "duration" not in rows.column_names:
        audio_column = columns.audio_column if source.values is None else ""
        rows = _measured(rows, files, clips, audio_column, source_name(source.name))
    num_usable = len(rows) - column_of(rows, "duration").null_count
    logger.info("%s, split %s: %d clips", source_name(source.name), split, num_usable)
    return rows


def _join(parts: list[Dataset], split: str, sources: list[str], skipped: list[str] | None = None) -> Dataset:
    """One corpus of several; clips that cannot be used are left out, and their ids added to `skipped`."""
    corpus = _with_unique_ids(concatenate_datasets(parts))
    is_usable = column_of(corpus, "duration").is_valid()
    usable = np.flatnonzero(is_usable)
    if skipped is not None:
        skipped += column_of(corpus, "id").filter(compute.invert(is_usable)).to_pylist()
    if len(usable) == 0:
        raise FileNotFoundError(
            f"no usable audio in split {split!r} of {', '.join(sources)}: see the skipped files above"
        )
    return corpus if len(usable) == len(corpus) else corpus.select(usable)


def _parquet_rows(paths: dict[str, pyarrow.parquet.FileMetaData], name: str, columns: Columns) -> Dataset:
    """Rows of parquet files, of which some may have columns that others lack.

    Args:
        paths: with what their footers say.

    Raises:
        ValueError: there are no rows, or a file lacks a column that is needed.
    """
    filled = {path: footer for path, footer in paths.items() if footer.num_rows}
    if not filled:
        raise ValueError(f"{name}: {', '.join(Path(path).name for path in [*paths][:3])} has no rows")

    def kinds(path: str) -> tuple:
        """Types of the columns, and what `datasets` knows of them, such as the names of classes."""
        features = json.loads((filled[path].metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
        types = sorted((column.name, str(column.type)) for column in filled[path].schema.to_arrow_schema())
        return types, json.dumps(features, sort_keys=True)

    parts = []
    for _, group in groupby(filled, kinds):
        group = list(group)
        shown = name if len(group) == len(filled) else f"{name}, {Path(group[0]).name}"
        rows = load_dataset("parquet", data_files=[*map(glob.escape, group)], split="train")
        parts.append(standard_columns(rows, shown, columns))
    if any("duration" not in part.column_names for part in parts):
        parts = [part.remove_columns([*{"duration"} & set(part.column_names)]) for part in parts]
    return concatenate_datasets(parts)


def _footer(file: Path) -> pyarrow.parquet.FileMetaData:
    try:
        return pyarrow.parquet.read_metadata(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None


def _audio_rows(files: Files, texts: dict[str, pyarrow.Array]) -> Dataset:
    """Rows of audio files, which are named by their paths."""
    inside = compute.binary_join_element_wise(f"{files.folder}/", files.names, "")
    paths = compute.if_else(compute.starts_with(files.names, "/"), files.names, inside)
    nothing = pyarrow.nulls(len(paths), pyarrow.binary())
    audio = pyarrow.StructArray.from_arrays([nothing, paths], names=["bytes", "path"])
    rows = table_of({"id": files.names, "audio": audio, **texts})
    return rows.cast_column("audio", Audio(decode=False))


def _load_named(name: str, split: str) -> Dataset:
    """The embedded corpus, or a data set of the Hub."""
    if name == "demo":
        splits = load_demo()
        if split not in splits:
            raise ValueError(_no_split(name, split, splits))
        return splits[split]
    path, _, config = name.partition(":")
    try:
        return load_dataset(path, config or None, split=split)
    except ConnectionError as error:
        raise FileNotFoundError(f"no folder {name} here, and the Hub cannot be reached: {error}") from error


def _files_in_cache(rows: Dataset, split: str) -> Files:
    """Where `datasets` keeps the rows, as one file; a file that is not there for rows in memory and for slices of a
    split, which are of the same file as the whole."""
    files = [Path(file["filename"]) for file in rows.cache_files] or [Path(datasets.config.HF_DATASETS_CACHE, "none")]
    is_whole = re.fullmatch(r"[\w.-]+", split)
    states = [file.stat() for file in files if is_whole and file.exists()]
    return Files(
        files[0].parent,
        pyarrow.array([files[0].name]),
        np.array([sum(state.st_size for state in states) if states else -1]),
        np.array([max((state.st_mtime_ns for state in states), default=-1)]),
    )


def _with_unique_ids(rows: Dataset) -> Dataset:
    """Rows whose ids are all different: where they are not, their number is added."""
    names = column_of(rows, "id")
    if compute.count_distinct(names).as_py() == len(names):
        return rows
    numbers = pyarrow.array(range(len(rows))).cast(pyarrow.string())
    unique = compute.binary_join_element_wise(names, numbers, "#")
    return beside(rows.remove_columns("id"), {"id": unique}).select_columns(rows.column_names)


def _measured(rows: Dataset, files: Files, clips: np.ndarray, audio_column: str, name: str) -> Dataset:
    """Add the column duration, and name the clips that cannot be used."""
    audio = rows.data.column("audio")
    if audio_column and compute.struct_field(audio, "bytes").null_count:
        files = replace(files, sizes=np.full(len(files), -1))  # the clips are in files that nothing is known of
    seconds, problems = indexed_durations(audio, files, clips, audio_column, f"durations of {name}")
    if problems:
        logger.warning("skipped %d of %d files of %s:", len(problems), len(rows), name)
        for number in sorted(problems):
            logger.warning("skipped %s: %s", rows[number]["id"], problems[number])
    return beside(rows, {"duration": pyarrow.array(seconds, from_pandas=True)})


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


def _no_split(source: str, split: str, splits) -> str:
    return f"{source} has no split {split!r}; it has {', '.join(sorted(splits))}"
