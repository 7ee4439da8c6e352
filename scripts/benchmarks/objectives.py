"""Trains every objective for some updates on the same corpus and encoder, and prints what each has learned."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from hf_speechcl import OBJECTIVES

SCRIPTS = Path(__file__).resolve().parents[1]
DESCRIPTION = """Train every objective on the same corpus and encoder, and print a table.

  The embedded corpus, 200 updates each:
    python scripts/benchmarks/objectives.py --output_dir runs/objectives
  Some objectives, with options that go on to scripts/pretrain.py:
    python scripts/benchmarks/objectives.py --objectives best_rq cpc --output_dir runs/two --encoder small

What was trained already in the output folder is not trained again."""


def run(script: str, *options: str) -> None:
    subprocess.run([sys.executable, str(SCRIPTS / script), *map(str, options)], check=True)


def train(name: str, folder: Path, corpus: list[str], options: list[str]) -> None:
    if (folder / "results.json").is_file():
        return
    command = ["--objectives", f"{name}=1", "--corpus", *corpus, "--output_dir", folder, "--eval_on_start", "True"]
    if name == "hubert":
        units = folder.with_name("units")
        run("make_units.py", "--corpus", *corpus, "--output_dir", units)
        command += ["--units", units]
    run("pretrain.py", *command, "--save_strategy", "no", *options)


def row(name: str, folder: Path) -> str:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    first, *_, last = [entry for entry in log if "eval_loss" in entry]
    seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    accuracy = last.get(f"eval_{name}/accuracy")
    chance = last.get(f"eval_{name}/chance")
    return " | ".join(
        [
            f"| `{name}`",
            f"{first['eval_loss']:.3f} → {last['eval_loss']:.3f}",
            "" if accuracy is None else f"{accuracy:.3f}" + ("" if chance is None else f" (chance {chance:.3f})"),
            f"{last['eval_guard/encoder_std']:.2f}, {last['eval_guard/encoder_rank']:.0f}",
            ["healthy", "suspicious", "collapsed"][int(last["eval_guard/verdict"])],
            f"{seconds:.0f} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--corpus", nargs="+", default=["demo"], help="as for scripts/pretrain.py")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--max_steps", default="200")
    args, options = parser.parse_known_args()
    for name in args.objectives:
        train(name, args.output_dir / name, args.corpus, ["--max_steps", args.max_steps, *options])
    print("| objective | validation loss | accuracy | encoder: std, effective rank | guard | seconds |")
    print("|---|---|---|---|---|---|")
    for name in args.objectives:
        print(row(name, args.output_dir / name))


if __name__ == "__main__":
    main()
