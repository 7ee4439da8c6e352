#!/usr/bin/env python
"""Transcribe a corpus by a trained recogniser, to learn from: `python scripts/make_pseudo_labels.py --help`."""

import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.training.make_pseudo_labels import main  # noqa: E402

if __name__ == "__main__":
    main()
