"""A store of units: for every clip of two splits, the k-means cluster of each encoder frame.

A folder with `units.json` (options, what the units are like, their hash), `kmeans.safetensors` (the centroids) and
`units.parquet` (split, id, start of the part in seconds, units).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from safetensors.numpy import load_file, save_file

from .dataset import SpeechDataset
from .folders import write_whole

HASHED = ("layer", "weights", "sampling_rate", "samples_per_unit", "num_units")
MADE_WITH = ("corpus", "train_split", "validation_split", "validation_fraction", "max_seconds", "min_seconds")


class Units:
    """Units of the clips of a corpus.

    Args:
        folder: what messages call the store.
        description: the content of `units.json`: the options that the units were made with, among them
            `sampling_rate`, `samples_per_unit` and `num_units`, and the `units_hash`.
        centroids: (num_units, D) float32.
        table: rows split, id, start (seconds), units (list of int32; none for a clip that could not be decoded).
    """

    def __init__(self, folder: str | Path, description: dict, centroids: np.ndarray, table: pyarrow.Table):
        self.folder, self.description, self.centroids, self.table = folder, description, centroids, table

    @staticmethod
    def hash(options: dict, centroids: np.ndarray) -> str:
        """Names what the units mean: the centroids and what was clustered, not where it lies nor which clips it had."""
        digest = hashlib.sha256(json.dumps([options.get(name) for name in HASHED]).encode())
        digest.update(np.ascontiguousarray(centroids, dtype="<f4").tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def load(cls, folder: str | Path) -> "Units":
        """Read a store.

        Raises:
            FileNotFoundError: no such folder, or one that was not written to its end.
            ValueError: its centroids are not those that units.json speaks of.
        """
        path = Path(folder)
        if not (path / "units.json").is_file():
            raise FileNotFoundError(f"no units in {folder}: make them with scripts/make_units.py --output_dir {folder}")
        description = json.loads((path / "units.json").read_text(encoding="utf-8"))
        centroids = load_file(path / "kmeans.safetensors")["centroids"]
        if cls.hash(description, centroids) != description["units_hash"]:
            raise ValueError(f"{folder}: kmeans.safetensors and units.json are not of one making; make the units again")
        return cls(folder, description, centroids, pyarrow.parquet.read_table(path / "units.parquet"))

    def save(self) -> None:
        """Write the store into its folder, `units.json` last."""
        path = Path(self.folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({"centroids": self.centroids}, path / "kmeans.safetensors")
        pyarrow.parquet.write_table(self.table, path / "units.parquet")
        write_whole(path / "units.json", json.dumps(self.description, indent=1))

    def fill(self, options: dict, source: str | Path) -> dict:
        """Options of an objective with num_units, samples_per_unit and units_hash set to those of these units.

        Args:
            options: what the user, or the checkpoint `source`, says of them.

        Raises:
            ValueError: it says something else.
        """
        own = {name: self.description[name] for name in ("num_units", "samples_per_unit", "units_hash")}
        for name, value in own.items():
            if options.get(name) not in (None, "", value):
                raise ValueError(
                    f"mismatched units: {source} has {name}={options[name]!r}, but {self.folder} has {value!r}: leave "
                    "the option out, give the units that the encoder was trained with, or start a new encoder"
                )
        return options | own

    def of_clips(self, dataset: SpeechDataset, split: str) -> "ClipUnits":
        """Units of every clip of a data set, "train" or "validation" of those that the store was made from.

        Raises:
            ValueError: another sampling rate, clips without units, or units that do not fit a clip's duration.
        """
        rate = self.description["sampling_rate"]
        if dataset.sampling_rate != rate:
            raise ValueError(f"{self.folder} is of audio at {rate} Hz, the encoder takes {dataset.sampling_rate} Hz")
        table = self.table.filter(pyarrow.compute.equal(self.table["split"], split))
        stored = number_repeats(zip(table["id"].to_pylist(), table["start"].to_pylist()))
        places = {name: place for place, name in enumerate(stored)}
        names = clip_names(dataset)
        rows = np.array([places.get(name, -1) for name in number_repeats(names)])
        clips = ClipUnits(names, rows, table["units"].combine_chunks(), self.remedy())

        problems = [f"{id} has none" for (id, _), row in zip(names, rows) if row < 0]
        units_per_second = rate / self.description["samples_per_unit"]
        for index in np.flatnonzero(rows >= 0):
            # Durations may be off by 0.1 s and 5 % (corpora.py, _trusted_durations); the check of a batch is exact.
            count, expected = len(clips[index]), dataset.durations[index] * units_per_second
            if count and abs(count - expected) > 2 + 0.1 * units_per_second + 0.05 * expected:
                problems.append(f"{names[index][0]} has {count}, expected about {expected:.0f}")
        if problems:
            shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
            raise ValueError(
                f"mismatched units: of {len(names)} clips of {split}, {len(problems)} do not have theirs: {shown}. "
                + clips.remedy
            )
        return clips

    def remedy(self) -> str:
        """What to do where clips and units do not fit."""
        options = ", ".join(f"{name}={self.description.get(name)!r}" for name in MADE_WITH)
        return f"{self.folder} was made with {options}: give the same options, or delete it and make the units again"


class ClipUnits:
    """Units of the clips of one data set, by index."""

    def __init__(self, names: list[tuple[str, float]], rows: np.ndarray, column: pyarrow.ListArray, remedy: str):
        self.names, self.rows, self.remedy = names, rows, remedy
        self.offsets, self.values = column.offsets.to_numpy(), column.values.to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """(T,) int64, empty for a clip that could not be decoded when the units were made."""
        row = self.rows[index]
        return self.values[self.offsets[row] : self.offsets[row + 1]].astype(np.int64)

    def __call__(self, index: int, num_frames: int) -> np.ndarray:
        """Units of a clip of `num_frames` encoder frames.

        Raises:
            ValueError: it has another number of units.
        """
        units = self[index]
        if len(units) != num_frames:
            name, start = self.names[index]
            raise ValueError(
                f"mismatched units: {name}, from {start:g} s on, has {len(units)} units, expected {num_frames}, one a "
                f"frame. {self.remedy}"
            )
        return units


def clip_names(dataset: SpeechDataset) -> list[tuple[str, float]]:
    """Id and start in seconds of every clip of a data set, which name it for the store."""
    ids = dataset.corpus["id"][:]
    return [(ids[row], round(float(start), 3)) for row, start in zip(dataset.rows, dataset.starts)]


def number_repeats(names) -> list[tuple]:
    """Names made different: ids of two sources may be the same, and then their order tells them apart."""
    seen, numbered = {}, []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        numbered.append((*name, seen[name]))
    return numbered


def units_table(clips: list[tuple[str, tuple[str, float], np.ndarray]]) -> pyarrow.Table:
    """The table of a store, from (split, name of the clip, units) of every clip."""
    return pyarrow.table(
        {
            "split": pyarrow.array([split for split, _, _ in clips], pyarrow.string()),
            "id": pyarrow.array([id for _, (id, _), _ in clips], pyarrow.string()),
            "start": pyarrow.array([start for _, (_, start), _ in clips], pyarrow.float64()),
            "units": pyarrow.array([units for _, _, units in clips], pyarrow.list_(pyarrow.int32())),
        }
    )
