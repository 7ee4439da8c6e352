"""Pseudo-labels: audio with texts that a recogniser wrote, in a folder that make_pseudo_labels.py fills."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from datasets import Dataset, concatenate_datasets

from .corpora import column_of, load_corpus
from .folders import source_name

logger = logging.getLogger(__name__)

DESCRIPTION = "pseudo_labels.json"
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
            ValueError: not all of it was written.
        """
        file = Path(folder) / DESCRIPTION
        if not file.is_file():
            raise FileNotFoundError(f"no {DESCRIPTION} in {folder}: expected a folder of scripts/make_pseudo_labels.py")
        found = cls(Path(folder), json.loads(file.read_text(encoding="utf-8")))
        if not found.is_complete:
            raise ValueError(f"{folder} is not finished: run scripts/make_pseudo_labels.py with the same options again")
        return found

    @property
    def is_complete(self) -> bool:
        return "clips" in self.description

    def save_description(self) -> None:
        begun = self.folder / f"{DESCRIPTION}.begun"
        begun.write_text(json.dumps(self.description, indent=1, ensure_ascii=False), encoding="utf-8")
        begun.replace(self.folder / DESCRIPTION)


def recording_key(id: str, seconds: float) -> str:
    """What a recording is known by in other sources: its id and, as ids such as 001.wav are often used, its length."""
    return f"{id} {seconds:.2f}"


def load_pseudo_labels(folders: list[PseudoLabels], transcribed: Dataset) -> Dataset:
    """Rows as `load_corpus` gives them, their ids behind the folder's name.

    Args:
        transcribed: rows of the corpus that the true transcripts are of. Clips of its recordings are left out, and
            counted in the log: their texts are known, or they are held out.
    """
    known = set(map(recording_key, column_of(transcribed, "id").to_pylist(), transcribed["duration"]))
    parts = []
    for labels in folders:
        name = source_name(str(labels.folder))
        rows = load_corpus(str(labels.folder), require_text=True, keep_columns=["recording"])
        new = [row for row, recording in enumerate(rows["recording"]) if recording not in known]
        if len(new) < len(rows):
            logger.info("%s: %d of %d clips are of the corpus and left out", name, len(rows) - len(new), len(rows))
        ids = [f"{name}/{id}" for id in rows["id"]]
        rows = rows.remove_columns(["id", "recording"]).add_column("id", ids).select(new)
        parts.append(rows.select_columns(["id", "audio", "text", "duration"]))
    return concatenate_datasets(parts)
