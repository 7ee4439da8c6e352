#!/usr/bin/env python
"""Publish a trained model on the Hugging Face Hub: `python scripts/publish.py --help`."""

import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.publish import main  # noqa: E402

if __name__ == "__main__":
    main()
