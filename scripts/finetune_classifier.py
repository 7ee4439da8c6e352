#!/usr/bin/env python
"""Fine-tune an encoder to name the class of a clip: `python scripts/finetune_classifier.py --help`."""

import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.training.finetune_classifier import main  # noqa: E402

if __name__ == "__main__":
    main()
