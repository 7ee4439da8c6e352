#!/usr/bin/env python
"""Put a pre-trained model into the package, its weights in bfloat16, as `--encoder starter` and `--model starter`:

python scripts/pack_starter.py runs/starter

Of an encoder trained with hubert and another objective, hubert's head stays behind: its units are not in the package,
and training with other units would be refused.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402

from hf_speechcl import SpeechCLConfig, SpeechCLForPreTraining  # noqa: E402
from hf_speechcl.cards import CARD  # noqa: E402
from hf_speechcl.curves import CURVES  # noqa: E402
from hf_speechcl.hub import CODE, STARTER, WEIGHTS, published_files  # noqa: E402

LARGEST = 20e6  # bytes


def of_the_package(card: str) -> str:
    """A card whose examples load the model from the package."""
    card = re.sub(r'\.from_pretrained\(".*?", trust_remote_code=True', '.from_pretrained(find_model("starter")', card)
    imports = "from transformers import Auto"
    return card.replace(imports, f"from hf_speechcl.hub import find_model\n{imports}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of scripts/pretrain.py.")
    parser.add_argument("--output_dir", type=Path, default=STARTER, help="Folder to write.")
    args = parser.parse_args(argv)
    files = {file.name: file for file in published_files(args.model)}
    config = SpeechCLConfig.from_pretrained(args.model)
    objectives = config.objectives or {}
    config.objectives = {name: own for name, own in objectives.items() if name != "hubert"}
    if not config.objectives:
        raise ValueError(
            f"{args.model} was pre-trained with {', '.join(objectives) or 'no objective'}: nothing could go on from it "
            "with other audio; pre-train with another objective, or with another one beside hubert"
        )
    model = SpeechCLForPreTraining.from_pretrained(args.model, config=config, dtype=torch.float32)
    for parameter in model.parameters():  # quantisers, which are buffers, stay what they were
        parameter.data = parameter.data.bfloat16()
    if (size := sum(weight.nbytes for weight in model.state_dict().values())) > LARGEST:
        raise ValueError(f"{args.model} has {size / 1e6:.0f} MB in bfloat16, more than {LARGEST / 1e6:.0f} MB")
    model.save_pretrained(args.output_dir)
    config = json.loads((args.output_dir / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]  # the package it is in has the classes
    (args.output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in CODE:
        (args.output_dir / name).unlink()
    for name in (CURVES, "preprocessor_config.json"):
        shutil.copy(files[name], args.output_dir / name)
    (args.output_dir / CARD).write_text(of_the_package(files[CARD].read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{args.output_dir}: {(args.output_dir / WEIGHTS).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
