"""The embedded corpus: 24 minutes of recorded English telephone prompts with their transcripts (see LICENSE.md)."""

from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")


def load_demo() -> DatasetDict:
    """The embedded corpus, offline, with its splits train (19 min), validation (2 min) and test (3 min).

    One speaker; no text is in two splits. `audio` is `{"bytes", "path"}`, Ogg/Opus at 16 kHz, not decoded.
    """
    folder = Path(__file__).parent
    return DatasetDict({split: Dataset(pyarrow.parquet.read_table(folder / f"{split}.parquet")) for split in SPLITS})
