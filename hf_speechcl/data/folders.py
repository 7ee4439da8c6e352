"""What a local folder holds: audio files or parquet files, their splits, and the texts in metadata files."""

import csv
import hashlib
import json
import logging
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test", "testing", "eval", "evaluation"],
}
SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".sph", ".w64")
}
UNREAD_SUFFIXES = {".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".spx"}  # of audio, often
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
INDEX_FILE = ".hf_speechcl-durations.parquet"  # see index.py


def write_whole(file: Path, text: str) -> None:
    """Write a file of text beside what is there, then in its place: whoever reads meanwhile, or after a kill, finds the
    one or the other."""
    begun = file.with_name(f"{file.name}.begun")
    begun.write_text(text, encoding="utf-8")
    begun.replace(file)


@dataclass(frozen=True)
class Files:
    """Files of a folder, and what tells whether they have changed.

    Attributes:
        folder: where they are.
        names: (N,) paths relative to the folder, strings.
        sizes: (N,) bytes; -1 for a file that is not there.
        modified: (N,) nanoseconds since 1970.
    """

    folder: Path
    names: pyarrow.Array
    sizes: np.ndarray
    modified: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: np.ndarray) -> "Files":
        return Files(self.folder, self.names.take(pyarrow.array(numbers)), self.sizes[numbers], self.modified[numbers])


def is_local(source: str) -> bool:
    """Whether a corpus or model is a path here, rather than a name on the Hub."""
    path = Path(source).expanduser()
    return path.is_absolute() or path.exists()


def source_name(source: str) -> str:
    """A corpus or model as a file for others may name it: a Hub name as it is, a local path by its last part."""
    return Path(source).expanduser().resolve().name if is_local(source) else source


def without_folders(value):
    """An option as a file may keep it: of an absolute path its last part and a hash, which tells it from others."""
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    return f"{Path(value).name}#{hashlib.sha256(value.encode()).hexdigest()[:12]}"


def split_of(name: str) -> str:
    """The split of a file by its relative path.

    The first folder on the path that bears the name of a split decides, or else the first that begins with one, as in
    `dev-clean` and `test_2`; a parquet file is also judged by the beginning of its own name, as in
    `test-00000-of-00002.parquet`. What bears no such name is train.
    """
    return _named_split(name) or "train"


def relative_to(folder: Path, name: str) -> str:
    """A file's path from a folder, which may lead out of it."""
    return Path(os.path.relpath(name, os.path.abspath(folder))).as_posix() if name.startswith("/") else name


def _named_split(name: str) -> str | None:
    folders, _, file = name.lower().rpartition("/")
    return _split_of_parts(f"{folders}/{re.split('[-_.]', file)[0]}" if file.endswith(".parquet") else folders)


@lru_cache(maxsize=1024)
def _split_of_parts(parts: str) -> str | None:
    parts = parts.split("/")
    beginnings = [re.split(r"[-._ \d]", part)[0] for part in parts]
    return next((SPLIT_OF_NAME[name] for name in parts + beginnings if name in SPLIT_OF_NAME), None)


def list_files(
    path: Path, columns: tuple[str, ...] = (), required: tuple[str, ...] = ()
) -> tuple[Files, dict | None, dict[str, str]]:
    """What a source holds: the parquet files below a folder without audio files; one parquet file; or all audio files
    below a folder and all that its metadata name.

    Args:
        columns: columns of the metadata to return for every audio file.
        required: those of them without which a folder of audio files is refused.

    Returns:
        The files in order; for audio files their columns, as texts, null where there is no value: {column: (N,)}; and
        the splits of those, by name, that are in no split's folder and named by metadata that are.

    Raises:
        FileNotFoundError: there are none; the message says what there is.
        ValueError: metadata that cannot be read, lack a column or put a file into two splits, or required columns and
            no metadata.
    """
    if path.is_file():
        return _stat(path.parent, [path.name]), None, {}
    names, sizes, modified, parquet, metadata, dead, suffixes = [], [], [], [], [], [], Counter()
    for prefix, entries in _walk(path):
        for entry in entries:
            dot = entry.name.rfind(".")
            suffix = entry.name[dot:].lower() if dot > 0 else ""
            if entry.is_symlink() and not entry.is_file():
                dead.append(prefix + entry.name)
            elif suffix in AUDIO_SUFFIXES:
                state = entry.stat()
                names.append(prefix + entry.name)
                sizes.append(state.st_size)
                modified.append(state.st_mtime_ns)
            elif suffix == ".parquet":
                parquet.append(prefix + entry.name)
            else:
                suffixes[suffix or entry.name] += 1
                if entry.name in METADATA_FILES:
                    metadata.append(prefix + entry.name)
    warn_of_dead_links(path, dead)
    if parquet and not names:
        return _stat(path, parquet), None, {}
    if parquet:
        logger.warning("%s holds audio files and parquet files: %s is not used", path.name, ", ".join(parquet[:3]))
    files = Files(path, pyarrow.array(names, pyarrow.string()), np.array(sizes, int), np.array(modified, int))
    del names, sizes, modified
    warn_of_unread(path, suffixes)
    files, values, splits = _with_metadata(files, metadata, columns, required)
    if len(files) == 0:
        found = ", ".join(f"{count} × {suffix}" for suffix, count in suffixes.most_common(5)) or "nothing"
        expected = " ".join(sorted(AUDIO_SUFFIXES))
        raise FileNotFoundError(f"no audio in {path}: found {found}; expected {expected} or .parquet")
    if required and not metadata:
        raise ValueError(
            f"{path} has no {' and '.join(required)}: expected {' or '.join(METADATA_FILES)} in it, with the columns "
            f"{', '.join(['file_name', *required])}"
        )
    return files, values, splits


def _walk(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, list[os.DirEntry]]]:
    """All files below a folder, links to nothing too, sorted, in runs of the same folder; links to folders are named
    and not followed."""
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=attrgetter("name"))
    run = []
    for entry in entries:
        if not is_unicode(entry.name):
            logger.warning("skipped %s: its name is not UTF-8, rename it", ascii(prefix + entry.name))
        elif entry.is_dir(follow_symlinks=False):
            yield prefix, run
            run = []
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_dir():
            logger.warning("skipped %s%s: links to folders are not followed", prefix, entry.name)
        elif (entry.is_symlink() or entry.is_file()) and not entry.name.startswith(INDEX_FILE):
            run.append(entry)
    yield prefix, run


def is_unicode(name: str) -> bool:
    """Whether a file's name is UTF-8, as parquet files and decoders need it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def warn_of_unread(folder: Path, suffixes: Counter) -> None:
    """Log how many files of a folder are audio of kinds that are not read, given all its other suffixes."""
    for suffix in sorted(UNREAD_SUFFIXES & set(suffixes)):
        logger.warning("skipped %d × %s of %s: convert them to WAV or FLAC", suffixes[suffix], suffix, folder.name)


def warn_of_dead_links(folder: Path, links: list[str]) -> None:
    """Log how many audio and parquet files of a folder are links to nothing."""
    dead = [link for link in links if posixpath.splitext(link)[1].lower() in (*AUDIO_SUFFIXES, ".parquet")]
    if dead:
        logger.warning("skipped %d links to nothing in %s, such as %s", len(dead), folder.name, dead[0])


def _stat(folder: Path, names: list[str]) -> Files:
    sizes, modified = np.full((2, len(names)), -1)
    for number, name in enumerate(names):
        if (folder / name).is_file():
            state = os.stat(folder / name)
            sizes[number], modified[number] = state.st_size, state.st_mtime_ns
    return Files(folder, pyarrow.array(names, pyarrow.string()), sizes, modified)


def _with_metadata(files: Files, metadata: list[str], columns: tuple[str, ...], required: tuple[str, ...]):
    """Audio files and those that metadata files name, with columns of the metadata, where what is said last holds; and
    splits that only the metadata's folder tells."""
    named, values, splits = [], {column: [] for column in columns}, {}
    inside = tuple(f"{root}/" for root in (os.path.abspath(files.folder), os.path.realpath(files.folder)))
    for name in metadata:
        folder, split = posixpath.dirname(name), _named_split(name)
        for entry in _read_metadata(files.folder / name, ["file_name", *required]):
            file = posixpath.normpath(posixpath.join(folder, entry["file_name"]))
            for root in inside:
                file = file.removeprefix(root)
            named.append(file)
            is_unknown = split is not None and _named_split(relative_to(files.folder, file)) is None
            if is_unknown and splits.setdefault(file, split) != split:
                raise ValueError(f"{files.folder / name}: {file} is named in the metadata of split {splits[file]} too")
            for column in values:
                value = entry.get(column)
                values[column].append(None if value is None else str(value))
    if forms := _other_forms(files, _not_among(files, named).to_pylist()):
        named = [forms.get(name, name) for name in named]
        for name in forms.keys() & splits.keys():
            if splits.setdefault(forms[name], splits[name]) != splits[name]:
                raise ValueError(f"{files.folder}: {forms[name]} is named in the metadata of two splits")
    known = pyarrow.array(named[::-1], pyarrow.string())
    if again := len(known) - len(known.unique()):
        logger.warning("metadata of %s name files again, %d times: what is said last holds", files.folder.name, again)
    more = _not_among(files, named)
    if len(more):
        others = _stat(files.folder, more.to_pylist())
        _warn_of_near_names(files, [name for name, size in zip(more.to_pylist(), others.sizes) if size < 0])
        files = Files(
            files.folder,
            pyarrow.concat_arrays([files.names, others.names]),
            np.concatenate([files.sizes, others.sizes]),
            np.concatenate([files.modified, others.modified]),
        )
    places = pyarrow.compute.index_in(files.names, known)
    taken = {column: pyarrow.array(texts[::-1], pyarrow.string()).take(places) for column, texts in values.items()}
    return files, taken, splits


def _warn_of_near_names(files: Files, missing: list[str]) -> None:
    """Log names in the metadata that lack their suffix, or have another, or letters of another case."""
    by_stem = {posixpath.splitext(name)[0].lower(): name for name in files.names.to_pylist()} if missing else {}
    near = {}
    for name in missing:
        if found := by_stem.get(name.lower()) or by_stem.get(posixpath.splitext(name)[0].lower()):
            near[name] = found
    if near:
        name, found = next(iter(near.items()))
        logger.warning(
            "metadata of %s name %d files that are not there where one of nearly that name is, as %s for %s: file_name "
            "is the whole name",
            files.folder.name,
            len(near),
            name,
            found,
        )


def _not_among(files: Files, named: list[str]) -> pyarrow.Array:
    """The names that are not among the files, each once."""
    names = pyarrow.array(named, pyarrow.string()).unique()
    return names.filter(pyarrow.compute.invert(pyarrow.compute.is_in(names, files.names)))


def _other_forms(files: Files, missing: list[str]) -> dict[str, str]:
    """Files by the names that metadata give them in another form: letters and marks apart or not, with \\ for /."""

    def form(name: str) -> str:
        return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))

    by_form = {form(name): name for name in files.names.to_pylist()} if missing else {}
    return {
        name: by_form[form(name)] for name in missing if form(name) in by_form and not (files.folder / name).is_file()
    }


def _read_metadata(file: Path, required: list[str]) -> Iterator[dict]:
    """Rows of a metadata file; a row that lacks something is named by its line."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            for number, entry in _csv_rows(file, lines) if file.suffix == ".csv" else _json_rows(file, lines):
                for column in required:
                    if not isinstance(entry, dict) or column not in entry:
                        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                        raise ValueError(f"{file}, line {number}: no column {column!r}; it has {found}")
                if not isinstance(entry["file_name"], str) or "\n" in entry["file_name"]:
                    raise ValueError(f"{file}, line {number}: file_name is {entry['file_name']!r}, expected a path")
                if not entry["file_name"]:
                    raise ValueError(f"{file}, line {number}: file_name is empty")
                yield entry
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def _csv_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)  # a transcript of hours is longer than its default
    reader, begin = csv.DictReader(lines, strict=True), 1
    try:
        if reader.fieldnames is None:
            return
        while True:
            begin = reader.line_num + 1
            if (row := next(reader, None)) is None:
                return
            if None in row:
                raise ValueError(
                    f"{file}, line {reader.line_num}: more fields than the header has; quote texts that hold commas"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {begin}: {error}; a field that begins with a quotation mark ends with one, and those within "
            "are doubled"
        ) from None


def _json_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
