"""Durations of a corpus, read once from the headers of its files and kept beside it in a small parquet file.

An entry holds for a file of the same name, size and time of modification, so a file that is new or changed is measured
and every other one is not opened again. The index lies in the folder of the corpus, or, where that cannot be written,
in the cache folder of `datasets`. It may be deleted at any time.
"""

import contextlib
import hashlib
import logging
import os
import sys
import time
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import torch
from huggingface_hub import constants
from pyarrow import compute
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .audio import AudioError, read_duration
from .folders import INDEX_FILE, Files

logger = logging.getLogger(__name__)

SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),  # of the file, relative to the folder
        ("column", pyarrow.string()),  # with the audio, in a parquet file; empty for an audio file
        ("size", pyarrow.int64()),
        ("modified", pyarrow.int64()),
        ("seconds", pyarrow.list_(pyarrow.float64())),  # of each clip; null where it cannot be used
        ("problem", pyarrow.list_(pyarrow.string())),  # why not
    ]
)
# What judged the files: the number is to be raised when `read_duration` judges in another way.
VERSION = {b"hf_speechcl": f"durations 2, libsndfile {soundfile.__libsndfile_version__}".encode()}
CLIPS_PER_TASK = 256
CLIPS_WITHOUT_WORKERS = 4096  # fewer are measured before worker processes have begun
SECONDS_TO_WRITE = 3600  # an unfinished index that is older was left behind by a process that was killed
CLIPS_PER_WRITE = 100_000  # an interrupted start loses no more than this


def indexed_durations(
    audio: pyarrow.ChunkedArray, files: Files, clips: np.ndarray, column: str, title: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Seconds of every clip of some files, from the index or, where it does not know a file, from the headers.

    Args:
        audio: (N,) clips `{"bytes", "path"}`, file by file.
        files: where they are from.
        clips: how many each file holds; their sum is N.
        column: of the parquet files; empty for audio files.
        title: of the progress bar.

    Returns:
        (N,) seconds, and by their number what is wrong with clips that cannot be used, whose seconds are NaN.
    """
    if clips.sum() != len(audio):
        raise ValueError(
            f"{files.folder} has changed while it was read: {len(audio)} clips, expected {clips.sum()}: start again"
        )
    index = pyarrow.concat_tables([_read(place) for place in _places(files.folder)])
    places = compute.index_in(
        _keys(files.names, column, pyarrow.array(files.sizes), pyarrow.array(files.modified)),
        _keys(index["name"], index["column"], index["size"], index["modified"]),
    )
    entries = index.take(places)
    lengths = [compute.list_value_length(entries[name]).fill_null(-1).to_numpy() for name in ("seconds", "problem")]
    is_known = (lengths[0] == clips) & (lengths[1] == clips)
    entries = entries.filter(pyarrow.array(is_known))
    rows = np.flatnonzero(np.repeat(is_known, clips))
    seconds, problems = np.full(len(audio), np.nan), {}
    seconds[rows] = _flat(entries["seconds"]).to_numpy(zero_copy_only=False)
    why = _flat(entries["problem"])
    bad = np.flatnonzero(why.is_valid())
    problems.update(zip(rows[bad].tolist(), why.take(pyarrow.array(bad)).to_pylist()))

    unknown = np.flatnonzero(~is_known)
    starts = np.cumsum(clips) - clips
    total = int(clips[unknown].sum())
    parts = np.cumsum(clips[unknown]) // CLIPS_PER_WRITE
    with tqdm(total=total, desc=title, unit="clip", disable=total < 2000) as progress:
        for part in np.unique(parts):
            numbers = unknown[parts == part]
            rows = np.concatenate([np.arange(starts[number], starts[number] + clips[number]) for number in numbers])
            measured, wrong = _measure(audio, rows, progress)
            seconds[rows] = measured
            problems |= wrong
            _remember(audio, files.select(numbers), files.names, clips[numbers], column, measured, rows, wrong)
    return seconds, problems


def _measure(audio: pyarrow.ChunkedArray, rows: np.ndarray, progress: tqdm) -> tuple[np.ndarray, dict[int, str]]:
    """Seconds of these rows, by processes: most of what a header costs is Python's, so threads gain nothing."""
    workers = {}
    if len(rows) >= CLIPS_WITHOUT_WORKERS and sys.platform == "linux":  # elsewhere they would need a copy of the audio
        workers = {"num_workers": len(os.sched_getaffinity(0)), "multiprocessing_context": "fork"}
    seconds, problems = [], {}
    generator = torch.Generator()  # or it would draw from the one that weights are drawn from
    tasks = DataLoader(_Headers(audio, rows), batch_size=None, collate_fn=_as_it_is, generator=generator, **workers)
    for measured, wrong in tasks:
        seconds.append(measured)
        problems |= wrong
        progress.update(len(measured))
    return np.concatenate(seconds), problems


class _Headers(Dataset):
    def __init__(self, audio: pyarrow.ChunkedArray, rows: np.ndarray):
        self.audio, self.rows = audio, rows

    def __len__(self) -> int:
        return -(-len(self.rows) // CLIPS_PER_TASK)

    def __getitem__(self, task: int) -> tuple[np.ndarray, dict[int, str]]:
        rows = self.rows[task * CLIPS_PER_TASK : (task + 1) * CLIPS_PER_TASK].tolist()
        seconds, problems = np.full(len(rows), np.nan), {}
        for number, row in enumerate(rows):
            try:
                seconds[number] = read_duration(self.audio[row].as_py() or {})
            except AudioError as error:
                problems[row] = str(error)
        return seconds, problems


def _as_it_is(result):
    return result


def _remember(
    audio, files: Files, present: pyarrow.Array, clips, column: str, seconds, rows, problems: dict[int, str]
) -> None:
    """Add files to the index, but for those that may yet become readable as they are, and drop those that are gone."""
    owners = np.repeat(np.arange(len(files)), clips)
    is_inside = ~np.asarray(compute.match_substring_regex(files.names, r"^/|(^|/)\.\.(/|$)"))
    is_sure = (files.sizes >= 0) & is_inside
    for owner, row in zip(owners[np.isin(rows, list(problems))], sorted(problems)):
        is_sure[owner] &= _is_settled(audio[row].as_py() or {}, problems[row])
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(clips)]), pyarrow.int32())
    why = [problems.get(row) for row in rows.tolist()] if problems else [None] * len(rows)
    new = pyarrow.table(
        [
            files.names,
            pyarrow.array([column] * len(files), pyarrow.string()),
            files.sizes,
            files.modified,
            pyarrow.ListArray.from_arrays(offsets, pyarrow.array(seconds, from_pandas=True)),
            pyarrow.ListArray.from_arrays(offsets, pyarrow.array(why, pyarrow.string())),
        ],
        schema=SCHEMA,
    ).filter(pyarrow.array(is_sure))
    if not len(new):
        return
    beside, in_cache = _places(files.folder)
    for place in (beside, in_cache):
        if place == beside and not _may_write(files.folder):
            continue
        old = _read(place)
        is_replaced = compute.is_in(
            *(compute.binary_join_element_wise(part["name"], part["column"], "\0") for part in (old, new))
        )
        is_present = compute.is_in(old["name"], present)
        is_kept = [
            not replaced and (known or (files.folder / name).exists())
            for replaced, known, name in zip(*(values.to_pylist() for values in (is_replaced, is_present, old["name"])))
        ]
        try:
            _write(pyarrow.concat_tables([old.filter(pyarrow.array(is_kept, pyarrow.bool_())), new]), place)
            return
        except OSError as error:
            logger.warning("durations cannot be kept in %s: %s", place.name, error.strerror)


def _is_settled(audio: dict, problem: str) -> bool:
    """Whether the fault is in the clip itself, where it is found again, and not in where it is kept."""
    if audio.get("bytes") is not None:
        return True
    try:
        with open(audio["path"], "rb") as file:
            file.read(1)
        read_duration(audio)
    except AudioError as error:
        return str(error) == problem
    except (OSError, KeyError, TypeError):
        pass
    return False


def _places(folder: Path) -> tuple[Path, Path]:
    """Where the index may be: beside the data, and in the cache folder of `datasets`."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return folder / INDEX_FILE, Path(datasets.config.HF_DATASETS_CACHE, "hf_speechcl", f"{name}.parquet")


def _may_write(folder: Path) -> bool:
    """Whether the owner of a folder wants it to be written (the superuser could in any case), and it is no download of
    the Hub, in which a further file would be taken for damage."""
    is_download = Path(constants.HF_HUB_CACHE).resolve() in folder.resolve().parents
    return not is_download and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _read(place: Path) -> pyarrow.Table:
    """The entries of an index; none if it is missing, damaged, or was not written by this version."""
    try:
        table = pyarrow.parquet.ParquetFile(place).read()
    except FileNotFoundError:
        return SCHEMA.empty_table()
    except (pyarrow.ArrowException, OSError) as error:
        logger.warning("%s is not used and written anew: %s", place.name, str(error).split("\n")[0])
        return SCHEMA.empty_table()
    if table.schema != SCHEMA or table.schema.metadata != VERSION:
        logger.warning("%s is not used and written anew: another version wrote it", place.name)
        return SCHEMA.empty_table()
    return table.replace_schema_metadata()


def _write(index: pyarrow.Table, place: Path) -> None:
    """Put an index where readers and other writers find the old one or the new one, and nothing between."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in place.parent.glob(f"{INDEX_FILE}.*"):
        with contextlib.suppress(FileNotFoundError):  # another process may have finished it meanwhile
            if time.time() - abandoned.stat().st_mtime > SECONDS_TO_WRITE:
                abandoned.unlink()
    unfinished = place.with_name(f"{INDEX_FILE}.{uuid.uuid4().hex}")
    try:
        pyarrow.parquet.write_table(index.replace_schema_metadata(VERSION), unfinished, compression="zstd")
        os.replace(unfinished, place)
    finally:
        unfinished.unlink(missing_ok=True)


def _keys(names, columns, sizes, modified) -> pyarrow.Array:
    """What an entry is found by: a file of the same name, size and time of modification."""
    return compute.binary_join_element_wise(
        names, columns, sizes.cast(pyarrow.string()), modified.cast(pyarrow.string()), "\0"
    )


def _flat(lists: pyarrow.ChunkedArray) -> pyarrow.Array:
    return lists.combine_chunks().flatten()
