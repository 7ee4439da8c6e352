"""Pseudo-labels: audio with texts that a recogniser wrote, in a folder that make_pseudo_labels.py fills."""

import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import soundfile
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from .columns import column_of
from .corpora import load_corpus
from .dataset import SpeechDataset, clip_ids, decoded
from .folders import SPLIT_OF_NAME, source_name, write_whole

logger = logging.getLogger(__name__)

DESCRIPTION = "pseudo_labels.json"
ROWS_PER_GROUP = 100  # of the parquet files
AUDIO = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "audio": AUDIO,
        "text": pyarrow.string(),
        "duration": pyarrow.float64(),
        "recording": pyarrow.string(),
    }
)


@dataclass(frozen=True)
class PseudoLabels:
    """A folder of pseudo-labels.

    Attributes:
        folder: with parquet files of `SCHEMA` and the description.
        description: `identity`, what the texts depend on; `recognizer`, `corpus`, `text_policy` (None where it is not
            known) and `sampling_rate` (Hz); and when all is written `clips`, `hours` and what else was counted.
    """

    folder: Path
    description: dict

    @classmethod
    def load(cls, folder: str | Path) -> "PseudoLabels":
        """Read the description.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not all of it was written, or is there.
        """
        file = Path(folder) / DESCRIPTION
        if not file.is_file():
            raise FileNotFoundError(f"no {DESCRIPTION} in {folder}: expected a folder of scripts/make_pseudo_labels.py")
        found = cls(Path(folder), json.loads(file.read_text(encoding="utf-8")))
        if not found.is_complete:
            raise ValueError(f"{folder} is not finished: run scripts/make_pseudo_labels.py with the same options again")
        if found.num_missing:
            raise ValueError(
                f"{folder} lacks {found.num_missing} of its {found.description['clips']} clips: run "
                "scripts/make_pseudo_labels.py with the same options again"
            )
        return found

    @classmethod
    def open(cls, folder: Path, description: dict) -> "PseudoLabels":
        """The folder with what is there of these pseudo-labels already.

        Raises:
            FileExistsError: it holds something else.
        """
        labels = cls(folder, description)
        if not folder.exists() or all(path.name == f"{DESCRIPTION}.begun" for path in folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            labels.save_description()
        elif not (folder / DESCRIPTION).is_file():
            raise FileExistsError(f"{folder} holds other files: delete it or give another --output_dir")
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        made_with = found["identity"]
        changed = [
            f"{name}={made_with.get(name)!r}, now {value!r}"
            for name, value in description["identity"].items()
            if made_with.get(name, value) != value
        ]
        if changed:
            raise FileExistsError(
                f"{folder} holds texts made with {'; '.join(changed)}: delete it or give another --output_dir"
            )
        return cls(folder, found)

    @property
    def is_complete(self) -> bool:
        return "clips" in self.description

    @property
    def num_missing(self) -> int:
        """Clips that were written and are not there any more."""
        files = self.folder.glob("train-*.parquet")
        return max(0, self.description["clips"] - sum(pyarrow.parquet.read_metadata(file).num_rows for file in files))

    def save_description(self) -> None:
        write_whole(self.folder / DESCRIPTION, json.dumps(self.description, indent=1, ensure_ascii=False))


def recording_key(id: str, seconds: float) -> str:
    """What a recording is known by in other sources: its id, without the numbers that `load_corpus` adds where two have
    the same, and, as ids such as 001.wav are often used, its length."""
    return f"{re.sub(r'(#[0-9]+)+$', '', id)} {seconds:.2f}"


class KnownRecordings:
    """Recordings by their keys, each known again where it is named from another folder above or below, or moved to the
    folder of a split, and where one source says its length in tenths of a second.

    Args:
        keys: of `recording_key`.
    """

    def __init__(self, keys: Iterable[str]):
        self.parts: dict[tuple[str, int], list[tuple[list[str], int]]] = {}
        for key in keys:
            folders, name, hundredths = self._split(key)
            self.parts.setdefault((name, hundredths // 10), []).append((folders, hundredths))

    def __contains__(self, key: str) -> bool:
        folders, name, hundredths = self._split(key)
        return any(
            self._agree(hundredths, length)
            and all(one == other for one, other in zip(reversed(folders), reversed(known)))
            for tenths in range(hundredths // 10 - 1, hundredths // 10 + 2)
            for known, length in self.parts.get((name, tenths), [])
        )

    @staticmethod
    def _agree(one: int, other: int) -> bool:
        """Whether lengths in hundredths of a second are the same but for rounding, of one of them to tenths too."""
        return abs(one - other) <= 1 or (abs(one - other) <= 5 and 0 in (one % 10, other % 10))

    @staticmethod
    def _split(key: str) -> tuple[list[str], str, int]:
        id, _, seconds = key.rpartition(" ")
        *folders, name = id.split("/")
        return [folder for folder in folders if folder.lower() not in SPLIT_OF_NAME], name, round(100 * float(seconds))


def write_clips(dataset: SpeechDataset, texts: list[str | None], clips: list[int], file: Path) -> list[float]:
    """Write audio, as FLAC of 16 bits, and text of the clips that have one into a parquet file; the seconds of each."""
    clips, rows, written = [clip for clip in clips if texts[clip] is not None], [], []
    names, recordings = clip_ids(dataset), dataset.corpus["id"][:]
    seconds = column_of(dataset.corpus, "duration").to_pylist()
    begun = file.with_suffix(".begun")
    with pyarrow.parquet.ParquetWriter(begun, SCHEMA) as writer:
        progress = tqdm(decoded(dataset, clips), desc="writing", total=len(clips), unit="clip", mininterval=1)
        for clip, samples in zip(clips, progress):
            if samples is None:
                continue
            stream, row = io.BytesIO(), int(dataset.rows[clip])
            soundfile.write(stream, samples, dataset.sampling_rate, format="FLAC", subtype="PCM_16")
            rows.append(
                {
                    "id": names[clip],
                    "audio": {"bytes": stream.getvalue(), "path": None},
                    "text": texts[clip],
                    "duration": len(samples) / dataset.sampling_rate,
                    "recording": recording_key(recordings[row], seconds[row]),
                }
            )
            written.append(rows[-1]["duration"])
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
    if written:
        begun.replace(file)
    else:
        begun.unlink()
    return written


def load_pseudo_labels(folders: list[PseudoLabels], transcribed: Dataset) -> Dataset:
    """Rows as `load_corpus` gives them, their ids behind the folder's name.

    Args:
        transcribed: rows with a true transcript, and those held out for validation. Clips of these recordings are left
            out, and counted in the log.

    Raises:
        ValueError: none is left.
    """
    known = KnownRecordings(map(recording_key, column_of(transcribed, "id").to_pylist(), transcribed["duration"]))
    parts = []
    for labels in folders:
        name = source_name(str(labels.folder))
        rows = load_corpus(str(labels.folder), require_text=True, keep_columns=["recording"])
        new = [row for row, recording in enumerate(rows["recording"]) if recording not in known]
        if len(new) < len(rows):
            logger.info(
                "%s: %d of %d clips are of recordings whose text is known or held out, and left out",
                name,
                len(rows) - len(new),
                len(rows),
            )
        ids = [f"{name}/{id}" for id in rows["id"]]
        rows = rows.remove_columns(["id", "recording"]).add_column("id", ids).select(new)
        parts.append(rows.select_columns(["id", "audio", "text", "duration"]))
    if not sum(map(len, parts)):
        raise ValueError(
            "pseudo_labels: all clips are of recordings of the corpus that have a transcript or are held out for "
            "validation: leave pseudo_labels out, or write texts of other audio"
        )
    return concatenate_datasets(parts)
