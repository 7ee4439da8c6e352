#!/usr/bin/env python
"""Estimate an n-gram for beam search: `python scripts/build_lm.py --help`."""

import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.language_model import main  # noqa: E402

if __name__ == "__main__":
    main()
