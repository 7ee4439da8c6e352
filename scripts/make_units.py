#!/usr/bin/env python
"""Cluster the frames of a corpus into units for the objective hubert: `python scripts/make_units.py --help`."""

import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.training.make_units import main  # noqa: E402

if __name__ == "__main__":
    main()
