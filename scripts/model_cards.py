#!/usr/bin/env python
"""Copy the cards of trained models, with their curves, to model_cards/:

python scripts/model_cards.py runs/quickstart/encoder runs/quickstart/recognizer
python scripts/model_cards.py quickstart-encoder=runs/quickstart/encoder --output_dir model_cards

A card is as the training script and scripts/evaluate.py wrote it. A model that could not be published is refused.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from hf_speechcl.cards import CARD  # noqa: E402
from hf_speechcl.curves import CURVES  # noqa: E402
from hf_speechcl.hub import published_files  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[NAME=]FOLDER", help="A trained model and what to call its card.")
    parser.add_argument("--output_dir", default="model_cards", help="Folder for the cards.")
    args = parser.parse_args(argv)
    for model in args.models:
        name, _, folder = model.rpartition("=")
        files = {file.name: file for file in published_files(folder)}
        if path := re.search(r"(?<![\w.:/<])/(?:[\w.-]+/)+", files[CARD].read_text(encoding="utf-8")):
            raise ValueError(f"{files[CARD]} names a folder of this machine, {path[0]}: train with relative paths")
        output = Path(args.output_dir, name or Path(folder).name)
        output.mkdir(parents=True, exist_ok=True)
        for file in (CARD, CURVES):
            shutil.copy(files[file], output / file)
        print(output / CARD)


if __name__ == "__main__":
    main()
