#!/usr/bin/env python
"""The end of quickstart.sh: its table, the picture of its curves, three transcripts, and what to type next.

python scripts/quickstart_summary.py FOLDER SECONDS
"""

import json
import logging
import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from transformers import pipeline  # noqa: E402

import hf_speechcl  # noqa: E402, F401  (registers the model classes)
from hf_speechcl.curves import CURVES, plot_curves  # noqa: E402
from hf_speechcl.data import load_corpus  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.text import normalize_text  # noqa: E402


def main(folder: Path, seconds: float) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    histories = {
        label: json.loads((folder / run / "trainer_state.json").read_text())["log_history"]
        for label, run in {"pre-training": "encoder", "pre-trained": "recognizer", "from scratch": "scratch"}.items()
    }
    plot_curves(histories, folder / CURVES)

    recognizer = pipeline("automatic-speech-recognition", model=str(folder / "recognizer"))
    test = load_corpus("demo", "test")
    by_text = sorted((row for row in test if 2 < row["duration"] < 4), key=lambda row: row["text"])
    chosen = [by_text[len(by_text) * sixth // 6] for sixth in (1, 3, 5)]
    texts = recognizer([read_audio(row["audio"], 16000) for row in chosen])

    print(f"\nTest split, {len(test)} clips, texts never seen; shares of words and characters, [95% interval]\n")
    print(f"{'':30} {'WER':24} {'CER':24}")
    has_ngram = (folder / "recognizer/test-ngram.json").is_file()
    for ending, file in {"": "test", **({", with the n-gram": "test-ngram"} if has_ngram else {})}.items():
        for label, run in {"pre-trained": "recognizer", "from scratch": "scratch"}.items():
            scores = json.loads((folder / run / f"{file}.json").read_text())
            cells = [f"{scores[m]:6.1%} [{scores[m + '_low']:.1%}, {scores[m + '_high']:.1%}]" for m in ("wer", "cer")]
            print(f"{label + ending:30} {cells[0]:24} {cells[1]:24}")
    print(f"\nThree test clips, through the pipeline{' and with the n-gram' if has_ngram else ''}:")
    found = json.loads((folder / "recognizer/test-ngram.json").read_text())["transcripts"] if has_ngram else []
    with_ngram = {clip["id"]: clip["hypothesis"] for clip in found}
    for row, text in zip(chosen, texts):
        print(f"  {row['id']}\n    reference   {normalize_text(row['text'])}\n    transcript  {text['text']}")
        if has_ngram:
            print(f"    with n-gram {with_ngram[row['id']]}")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"\nCurves: {folder / CURVES}\nModel with its card: {folder / 'recognizer'}\nTime: {seconds:.0f} s")
    print(
        "\nNext, your own audio:\n"
        f"  {python} scripts/make_units.py --corpus YOUR_FOLDER --output_dir runs/units\n"
        f"  {python} scripts/pretrain.py --config scripts/configs/cpu-10min.yaml --corpus YOUR_FOLDER \\\n"
        "    --units runs/units --output_dir runs/mine"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
