"""What a local folder holds: audio files or parquet files, their splits, and the texts in metadata files."""

import csv
import hashlib
import json
import logging
import posixpath
import re
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test", "testing", "eval", "evaluation"],
}
SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


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

    The first folder on the path that bears the name of a split decides; a parquet file is also judged by the
    beginning of its own name, as in `test-00000-of-00002.parquet`. What bears no such name is train.
    """
    *folders, file = name.lower().split("/")
    if file.endswith(".parquet"):
        folders.append(re.split(r"[-_.]", file)[0])
    return next((SPLIT_OF_NAME[folder] for folder in folders if folder in SPLIT_OF_NAME), "train")


def parquet_files(path: Path) -> list[str]:
    """Relative names of the parquet files below a folder that holds no audio files, or the name of one such file."""
    if path.is_file():
        return [path.name]
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.parquet"))
    if files and any(file.suffix.lower() in AUDIO_SUFFIXES for file in path.rglob("*")):
        logger.warning("%s holds audio files and parquet files: %s is not used", path.name, ", ".join(files[:3]))
        return []
    return files


def audio_files(
    folder: Path, columns: tuple[str, ...] = (), required: tuple[str, ...] = ()
) -> dict[str, dict[str, str | None]]:
    """Relative names of all audio files below a folder, and of all that its metadata name.

    Args:
        columns: columns of the metadata to return for every file, as texts; None where there is no value.
        required: those of them without which the folder is refused.

    Raises:
        FileNotFoundError: there are none; the message says what there is.
        ValueError: metadata that cannot be read or lack a column, or required columns and no metadata.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    nothing = dict.fromkeys(columns)
    values: dict[str, dict[str, str | None]] = {
        file.relative_to(folder).as_posix(): nothing for file in files if file.suffix.lower() in AUDIO_SUFFIXES
    }
    metadata = [file for file in files if file.name in METADATA_FILES]
    for file in metadata:
        for entry in _read_metadata(file, ["file_name", *required]):
            name = posixpath.normpath(posixpath.join(file.parent.relative_to(folder).as_posix(), entry["file_name"]))
            values[name] = {column: None if entry.get(column) is None else str(entry[column]) for column in columns}
    if not values:
        suffixes = Counter(file.suffix.lower() or file.name for file in files)
        found = ", ".join(f"{count} × {suffix}" for suffix, count in suffixes.most_common(5)) or "nothing"
        expected = " ".join(sorted(AUDIO_SUFFIXES))
        raise FileNotFoundError(f"no audio in {folder}: found {found}; expected {expected} or .parquet")
    if required and not metadata:
        raise ValueError(
            f"{folder} has no {' and '.join(required)}: expected {' or '.join(METADATA_FILES)} in it, with the columns "
            f"{', '.join(['file_name', *required])}"
        )
    return values


def _read_metadata(file: Path, required: list[str]) -> list[dict]:
    """Rows of a metadata file; a row that lacks something is named by its line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    entries = []
    if file.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        entries = [(reader.line_num, row) for row in reader]
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entries += [(number, json.loads(line))] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
    for number, entry in entries:
        if isinstance(entry, dict) and None in entry:
            raise ValueError(f"{file}, line {number}: more fields than the header has; quote texts that hold commas")
        for column in required:
            if not isinstance(entry, dict) or column not in entry:
                found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(f"{file}, line {number}: no column {column!r}; it has {found}")
        if not entry["file_name"]:
            raise ValueError(f"{file}, line {number}: file_name is empty")
    return [entry for _, entry in entries]
