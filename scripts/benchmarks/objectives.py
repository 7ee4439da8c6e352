#!/usr/bin/env python
"""The controlled comparison of objectives: `python scripts/benchmarks/objectives.py --help`."""

import argparse
import logging
import signal
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from chains import Chain, Comparison, chain_name
from comparison_report import write_report
from processes import Results, RunError
from recipes import build_recipe, clock_of, of_own_length, read_config, same_in_both_tables
from tiers import PHASES, TierData
from transformers import HfArgumentParser

from hf_speechcl.command_line import option

logger = logging.getLogger("objectives")

HERE = Path(__file__).resolve().parent
TABLES = ("updates", "time")
DESCRIPTION = """Pre-train, fine-tune and score every objective with the same encoder, data and updates, beside models
from scratch; PROTOCOL.md says how. One row for every finished run in OUTPUT/results.parquet, and a report with plots.

  One seed of the smallest tier within 25 minutes on two cores:
    python scripts/benchmarks/objectives.py --quick True --jobs 2
  What would be run, and for how long:
    python scripts/benchmarks/objectives.py --tiers T1 --seeds 0 1 2 --dry_run True
  Two arms on development sets; then everything on the test set:
    python scripts/benchmarks/objectives.py --tiers T1 --arms best_rq scratch --phase dev
    python scripts/benchmarks/objectives.py --tiers T1 --seeds 0 1 2 --jobs 2
  Equal time instead of equal updates, which are timed first; the report again:
    python scripts/benchmarks/objectives.py --tiers T1 --seeds 0 1 2 --table time
    python scripts/benchmarks/objectives.py --report_only True

A run that was finished is not made again, one that was killed goes on from its last checkpoint."""


@dataclass
class ComparisonArguments:
    config: str = option(str(HERE / "objectives.yaml"), "YAML file with tiers, arms and their options.")
    data: str = option("../shared/data", "Folder with pool, phones_ru, prompts_en and queen_en.")
    output_dir: str = option("runs/objectives", "Folder for everything; with quick its sub-folder quick.")
    tiers: list[str] = option([], "Of those in the YAML; T1 if not given.")
    arms: list[str] = option([], "Of those in the YAML; all if not given.")
    seeds: list[int] = option([], "Of initialisation, batches and labelled clips; 0 if not given.")
    phase: str | None = option(
        None, "dev: development labels, scored on validation; final, if not given: scored on test."
    )
    labels: list[str] = option([], "Label sizes of the phase, in minutes, or all; those in the YAML if not given.")
    table: str = option("updates", "updates: as many for every arm; time: as long as the reference arm is trained.")
    jobs: int = option(1, "Runs side by side, each with the threads of its tier.")
    quick: bool = option(False, "The quick section of the YAML, for what is not given, and its updates.")
    dry_run: bool = option(False, "Print what would be run, and end.")
    report_only: bool = option(False, "Write the report of what is there, and end.")

    def __post_init__(self):
        for name, known in (("phase", PHASES), ("table", TABLES)):
            if getattr(self, name) not in (*known, None):
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be positive, found {self.jobs}")


def complete(args: ComparisonArguments, config: dict) -> ComparisonArguments:
    """With what was not given: as the quick section says, if that is asked for, or the first tier on test."""
    found = {"tiers": ["T1"], "seeds": [0], "phase": "final"}
    if args.quick:
        quick = config["quick"]
        found = {name: quick[name] for name in ("seeds", "phase", "arms")} | {"tiers": [quick["tier"]]}
        found["labels"] = list(map(str, quick["labels"]))
    return replace(args, **{name: value for name, value in found.items() if not getattr(args, name)})


def plan(args: ComparisonArguments, config: dict, rows: list[dict], output: Path) -> list[Chain]:
    """Every chain that was asked for, with the label sizes that are to be done.

    Raises:
        ValueError: a tier, an arm or a label size that the YAML does not have.
    """
    made = {row["run"] for row in rows}
    chains = []
    for tier in dict.fromkeys(args.tiers):
        if tier not in config["tiers"]:
            raise ValueError(f"tiers: expected of {', '.join(config['tiers'])}, found {tier}")
        known = list(map(str, config["tiers"][tier]["labels"][args.phase]))
        reference = build_recipe(config, tier, config["reference_arm"], [], args.quick)
        sizes = list(dict.fromkeys(args.labels or known))
        arms = list(dict.fromkeys(args.arms or config["arms"]))
        for field_name, found, expected in (("labels", sizes, known), ("arms", arms, list(config["arms"]))):
            if unknown := [name for name in found if name not in expected]:
                raise ValueError(f"{field_name}: expected of {', '.join(expected)}, found {', '.join(unknown)}")
        for seed in dict.fromkeys(args.seeds):
            for arm in arms:
                recipe = build_recipe(config, tier, arm, sizes, args.quick)
                if args.table == "time" and arm in same_in_both_tables(config):
                    continue
                if args.table == "time" and arm in of_own_length(config):
                    logger.warning("%s is left out of the table of equal time: its length is its own", arm)
                    continue
                of_time = reference if args.table == "time" else None
                measured_in = reference.pretraining_hash() if of_time or recipe.needs_rows else None
                if recipe.budget is not None:
                    measured_in = recipe.budget.pretraining_hash()
                folder = output / "runs" / tier / arm / chain_name(recipe, seed, measured_in)
                chain = Chain(recipe, seed, args.table, args.phase, folder, sizes, measured_in, of_time)
                chains.append(replace(chain, sizes=[size for size in sizes if chain.run_name(size) not in made]))
    return chains


def estimate_minutes(chain: Chain, config: dict, rows: list[dict]) -> float | None:
    """Of a chain on an idle machine: by what earlier runs of the arm took, else by the YAML; None if not known yet."""
    recipe, tier = chain.recipe, config["tiers"][chain.recipe.tier]
    if recipe.needs_rows:
        return None
    trained = chain.reference or recipe
    same = [row for row in rows if row["tier"] == recipe.tier and row["arm"] == trained.encoder_arm and row["updates"]]
    per_update = dict(tier["seconds_per_update"])
    if same:
        per_update["pretraining"] = same[-1][f"pretraining_{clock_of(tier)}_seconds"] / same[-1]["updates"]
    finetuning = [recipe.finetuning[size]["max_steps"] for size in chain.sizes]
    seconds = per_update["finetuning"] * sum(finetuning)
    if chain.reference is not None:
        seconds += 2 * sum(config["timed_updates"]) * per_update["pretraining"]
    for options in (stage["pretraining"] for stage in trained.stages):
        seconds += float(options.get("seconds", 0)) + per_update["pretraining"] * options.get("max_steps", 0)
    if recipe.self_training is not None:
        for parts in map(recipe.self_training.get, chain.sizes):
            more = parts["rounds"] * parts["student"]["max_steps"] + parts["last"]["max_steps"]
            seconds += per_update["finetuning"] * more
    return seconds / 60


def print_plan(chains: list[Chain], config: dict, rows: list[dict]) -> None:
    """What is to be done, and how long it may take."""
    print("| tier | arm | seed | updates | labels: updates | minutes |\n|---|---|---|---|---|---|")
    total = 0.0
    for chain in filter(lambda chain: chain.sizes, chains):
        recipe, minutes = chain.recipe, estimate_minutes(chain, config, rows)
        updates = "as long as others" if recipe.updates is None or chain.reference else recipe.updates
        updates = f"{updates}, self-training" if recipe.self_training else updates
        sizes = ", ".join(f"{size}: {recipe.finetuning[size]['max_steps']}" for size in chain.sizes)
        shown = "by rows to come" if minutes is None else f"{minutes:.0f}"
        print(f"| {recipe.tier} | {recipe.arm} | {chain.seed} | {updates} | {sizes} | {shown} |")
        total += minutes or 0.0
    left = sum(len(chain.sizes) for chain in chains)
    print(f"\n{left} runs to be made, in {total:.0f} minutes of one process beside those that others' rows decide")


def parse(argv: list[str] | None = None) -> ComparisonArguments:
    parser = HfArgumentParser(
        ComparisonArguments,
        usage="%(prog)s [--OPTION VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    config, output = read_config(Path(args.config)), Path(args.output_dir)
    args = complete(args, config)
    if args.quick:
        output = output / "quick"
    results = Results(output / "results.parquet")
    failed = 0
    if not args.report_only:
        chains = plan(args, config, results.rows(), output)
        if args.dry_run:
            print_plan(chains, config, results.rows())
            return 0
        data = {tier: TierData(tier, Path(args.data), output / "data") for tier in args.tiers}
        for chain in chains:  # before any run, so that a size there is not is found at once
            for size in chain.sizes:
                data[chain.recipe.tier].labels(chain.phase, size, chain.seed)
        failed = run_all(Comparison(config, data, results), chains, args.jobs)
    print(write_report(results.rows(), config, output))
    if failed:
        logger.error("%d runs failed: their ends are above; the same command goes on with them", failed)
    return 1 if failed else 0


def run_all(comparison: Comparison, chains: list[Chain], jobs: int) -> int:
    """Make every encoder once and fine-tune it, label size by label size, `jobs` runs side by side; those last that are
    measured in the time of others. How many runs failed."""
    failed = 0
    for measured in (False, True):
        groups: dict[Path, list[Chain]] = {}  # of the same encoder
        for chain in chains:
            if chain.sizes and chain.recipe.needs_rows == measured:
                groups.setdefault(comparison.encoder_folder(chain), []).append(chain)
        failed += run_groups(comparison, deque(groups.values()), jobs)
    return failed


def run_groups(comparison: Comparison, groups: deque[list[Chain]], jobs: int) -> int:
    """As `run_all`, of chains grouped by their encoder; fine-tuning goes before the next encoder."""
    ready: deque = deque()
    running: dict[Future, tuple[str, list[Chain]]] = {}
    failed = 0
    pool = ThreadPoolExecutor(jobs)
    try:
        while ready or groups or running:
            while len(running) < jobs and (ready or groups):
                if ready:
                    chain, size, *encoder = ready.popleft()
                    running[pool.submit(comparison.finish, chain, size, *encoder)] = (size, [chain])
                else:
                    group = groups.popleft()
                    running[pool.submit(comparison.make_encoder, group[0])] = ("", group)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                size, group = running.pop(future)
                if error := future.exception():
                    for chain in group:
                        left = [size] if size else chain.sizes
                        failed += len(left)
                        shown = (chain.recipe.arm, chain.seed, ", ".join(left), error)
                        trace = None if isinstance(error, RunError) else error
                        logger.error("failed: %s seed %d, labels %s. %s", *shown, exc_info=trace)
                elif not size:
                    ready.extend((chain, own, *future.result()) for chain in group for own in chain.sizes)
    except BaseException:
        comparison.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of runs end as well
    sys.exit(main())
