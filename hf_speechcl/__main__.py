"""`python -m hf_speechcl COMMAND`: the scripts, wherever the package is installed."""

import sys
from importlib import import_module

COMMANDS = {
    "pretrain": ("training.pretrain", "train an encoder on audio without texts"),
    "make-units": ("training.make_units", "units for the objective hubert"),
    "finetune-ctc": ("training.finetune_ctc", "make a recogniser of an encoder with transcribed audio"),
    "make-pseudo-labels": ("training.make_pseudo_labels", "texts of audio without texts, to learn from"),
    "finetune-classifier": ("training.finetune_classifier", "make a classifier of an encoder with labelled audio"),
    "build-lm": ("language_model", "an n-gram for beam search, from texts"),
    "evaluate": ("evaluation.evaluate", "error rates of a recogniser on a corpus"),
    "transcribe": ("transcribe", "audio files of any length to text, JSON or subtitles"),
    "publish": ("publish", "put a trained model on the Hub"),
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in COMMANDS:
        sys.argv = [f"python -m hf_speechcl {command}", *sys.argv[2:]]
        import_module(f".{COMMANDS[command][0]}", __package__).main()
        return
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(
        [
            "usage: python -m hf_speechcl COMMAND [--help] …",
            "",
            *lines,
            "",
            "For example: python -m hf_speechcl transcribe runs/ctc speech.wav",
        ]
    )
    if command in (None, "-h", "--help"):
        print(usage)
    else:
        sys.exit(f"{usage}\n\nerror: no command {command!r}")


if __name__ == "__main__":
    main()
