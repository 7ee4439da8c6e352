"""Data of the comparison: which audio of a tier is unlabelled, which clips have labels, and what is scored."""

import json
import os
import random
import shutil
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from processes import made_once

COLUMNS = ["id", "audio", "text", "speaker", "duration"]
SILENCE = "pau"
LETTERS = string.ascii_lowercase + "".join(map(chr, range(ord("а"), ord("я") + 1)))
VALIDATION_CLIPS = 40  # of phones_ru/train
LABELLED = {"T2": "prompts_en", "T3": "queen_en"}
TIERS = ("T1", *LABELLED)
PHASES = ("dev", "final")
PHONE_SPLITS = ("train", "test")
TRAIN = "train.parquet"


@dataclass(frozen=True)
class Labels:
    """Clips to fine-tune on, and the clips that are scored then.

    Attributes:
        corpus: a source with the splits train and validation.
        minutes: of its train split.
        scored: a source and its split.
        held_out: whether no clip of the validation split is in train.
    """

    corpus: str
    minutes: float
    scored: tuple[str, str]
    held_out: bool


class TierData:
    """One tier's sources, made of the shared data where they are not a part of it as it is.

    Args:
        name: T1, T2 or T3.
        data: folder with pool, phones_ru, prompts_en and queen_en.
        folder: for what is made, each part of it once.

    Attributes:
        unlabelled: sources of audio to pre-train on.
        near: those of them that are like the audio of the labels.
        same_language: those of them in the language of the labels, for self-training.
        probe, voices: sources of clips with phones and of clips with speakers.

    Raises:
        FileNotFoundError: `data` lacks a part of it.
        ValueError: a test utterance of T1 is among its unlabelled audio, or the pool lacks a source that is needed.
    """

    def __init__(self, name: str, data: Path, folder: Path):
        self.name, self.data, self.folder = name, data, folder / name
        needed = ["pool"] if name == "T1" else ["pool", "prompts_en", "queen_en"]
        parts = dict.fromkeys([*needed, "phones_ru", "queen_en"])
        if missing := [part for part in parts if not (data / part).is_dir()]:
            raise FileNotFoundError(f"data: {data} has no {', '.join(missing)}, which {name} is made of or probed with")
        self.probe, self.voices = str(data / "phones_ru"), str(data / "queen_en")
        self._check_made_of(parts)
        if name == "T1":
            make_once(self.folder / "sources", self._make_phones)
            self.unlabelled = self.same_language = self.near = [str(self.folder / "sources/unlabelled")]
        else:
            self.unlabelled = [str(data / part) for part in needed]
            self.same_language = [str(data / part) for part in needed if part != "pool"]
            self.near = [str(data / LABELLED[name])]
        if name == "T2":
            make_once(self.folder / "prompts", lambda folder: write_rows(self._from_pool("asterisk"), folder / TRAIN))
            self.near.append(str(self.folder / "prompts"))

    def _check_made_of(self, parts: Iterable[str]) -> None:
        """That what is in the folder was made of these parts of the data.

        Raises:
            FileExistsError: it was made of others.
        """
        files = sorted(file for part in parts for file in (self.data / part).glob("*.parquet"))
        sizes = {str(file.relative_to(self.data)): file.stat().st_size for file in files}
        self.folder.mkdir(parents=True, exist_ok=True)
        made_of = made_once(self.folder / "made_of.json", lambda: sizes)
        if changed := sorted(name for name, _ in made_of.items() ^ sizes.items()):
            raise FileExistsError(
                f"{self.folder} was made of data with another {changed[0]} than {self.data} has now: give another "
                "--output_dir"
            )

    def _from_pool(self, source: str) -> pyarrow.Table:
        """Rows of the pool whose source's name begins so.

        Raises:
            ValueError: there are none.
        """
        pool = [pyarrow.parquet.read_table(file) for file in sorted(self.data.glob("pool/*.parquet"))]
        pool = pyarrow.concat_tables(table.select([*COLUMNS, "source"]) for table in pool)
        chosen = [row for row, name in enumerate(pool["source"].to_pylist()) if name.startswith(source)]
        if not chosen:
            raise ValueError(f"data: {self.data / 'pool'} has no audio whose source begins with {source}")
        return pool.take(chosen)

    def _make_phones(self, folder: Path) -> None:
        splits = {split: pyarrow.parquet.read_table(self.data / f"phones_ru/{split}.parquet") for split in PHONE_SPLITS}
        unlabelled = self._from_pool("festvox-ru")
        if shared := set(splits["test"]["id"].to_pylist()) & set(unlabelled["id"].to_pylist()):
            raise ValueError(f"data: {len(shared)} test clips of phones_ru are in the pool, such as {min(shared)}")
        letters = letters_of(splits["train"]["phones"].to_pylist())
        (folder / "phones.json").write_text(json.dumps(letters, ensure_ascii=False, indent=1), encoding="utf-8")
        write_rows(unlabelled, folder / "unlabelled" / TRAIN)
        for split, table in splits.items():
            texts = [
                "".join(letters[phone] for phone in row if phone != SILENCE) for row in table["phones"].to_pylist()
            ]
            table = table.set_column(table.column_names.index("text"), "text", pyarrow.array(texts))
            write_rows(table, folder / f"labelled/{split}.parquet")

    def labels(self, phase: str, size: str, seed: int) -> Labels:
        """So many minutes of labels, or "all", by seed: smaller sets are parts of larger ones of the same seed."""
        if self.name != "T1" and size == "all":
            return self._describe(self.data / LABELLED[self.name], phase)
        name = f"{phase}-all" if size == "all" else f"{phase}-{size}-{seed}"
        make_once(self.folder / name, lambda folder: self._make_labels(folder, phase, size, seed))
        return self._describe(self.folder / name, phase)

    def _make_labels(self, folder: Path, phase: str, size: str, seed: int) -> None:
        source = self.folder / "sources/labelled" if self.name == "T1" else self.data / LABELLED[self.name]
        train = by_id(pyarrow.parquet.read_table(source / TRAIN))
        if self.name == "T1":
            order = list(range(len(train)))
            random.Random("validation").shuffle(order)
            validation = train.take(order[:VALIDATION_CLIPS])
            if phase == "dev":
                train = train.take(sorted(order[VALIDATION_CLIPS:]))
        else:
            validation = pyarrow.parquet.read_table(source / "validation.parquet")
        write_rows(train if size == "all" else draw_minutes(train, float(size), seed), folder / TRAIN)
        write_rows(validation, folder / "validation.parquet")

    def _describe(self, corpus: Path, phase: str) -> Labels:
        test = (self.folder / "sources/labelled" if self.name == "T1" else self.data / LABELLED[self.name], "test")
        source, split = (corpus, "validation") if phase == "dev" else test
        durations = pyarrow.parquet.read_table(corpus / TRAIN, columns=["duration"])["duration"]
        held_out = self.name != "T1" or phase == "dev"
        return Labels(str(corpus), sum(durations.to_pylist()) / 60, (str(source), split), held_out)


def letters_of(phones: list[list[str]]) -> dict[str, str]:
    """A letter for every phone but silence, in the order of their symbols, so that CER is the phone error rate."""
    symbols = sorted({phone for row in phones for phone in row} - {SILENCE})
    if len(symbols) > len(LETTERS):
        raise ValueError(f"phones: {len(symbols)} different ones, and there are {len(LETTERS)} letters for them")
    return dict(zip(symbols, LETTERS))


def by_id(table: pyarrow.Table) -> pyarrow.Table:
    return table.sort_by("id")


def draw_minutes(table: pyarrow.Table, minutes: float, seed: int) -> pyarrow.Table:
    """Clips of `table`, sorted by id, in an order shuffled by `seed`, until they last `minutes`.

    Raises:
        ValueError: all together are shorter.
    """
    order, durations = list(range(len(table))), table["duration"].to_pylist()
    random.Random(seed).shuffle(order)
    chosen, seconds = [], 0.0
    for row in order:
        if seconds >= 60 * minutes:
            break
        chosen.append(row)
        seconds += durations[row]
    if seconds < 60 * minutes:
        raise ValueError(f"labels: {minutes:g} minutes were asked for and there are {seconds / 60:.1f}: write all")
    return table.take(chosen)


def write_rows(table: pyarrow.Table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = table.select(COLUMNS).replace_schema_metadata(None)
    pyarrow.parquet.write_table(table, file, row_group_size=100)


def make_once(folder: Path, make) -> None:
    """Call `make` with an empty folder that becomes `folder` when it is done, unless that is there."""
    if folder.is_dir():
        return
    begun = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    make(begun)
    try:
        begun.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
        shutil.rmtree(begun)
