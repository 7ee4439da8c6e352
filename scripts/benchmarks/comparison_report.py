"""The comparison's results → tables in Markdown, and plots."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from recipes import baselines, clock_of, measured_in_time, of_own_length, same_in_both_tables, whole_budgets

from hf_speechcl.evaluation.asr import bootstrap_interval, resample
from hf_speechcl.machine import machine_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

logger = logging.getLogger(__name__)

RESAMPLES = 1000
USEFUL = 0.6  # error of the best arm, above which a column does not count
CONVERGED_SHARE, CONVERGED_LOSS = 0.1, 0.05  # the loss fell by less than this share, or by less than this, at the end
NAMES = {("T1", "cer"): "phone error rate"}


@dataclass(frozen=True)
class Cell:
    """Runs of one recipe with one label size, of several seeds.

    Attributes:
        rows: one for each seed, in their order.
        score: cer or wer.
    """

    rows: list[dict]
    score: str

    @property
    def rates(self) -> list[float]:
        return [row[self.score] for row in self.rows]

    @property
    def mean(self) -> float:
        return float(np.mean(self.rates))

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, None of a single one."""
        return float(np.std(self.rates, ddof=1)) if len(self.rates) > 1 else None

    @property
    def minutes(self) -> float:
        return float(np.mean([row["label_minutes"] for row in self.rows]))

    @property
    def has_converged(self) -> bool:
        """Of a self-trained arm it is not asked: the last of its trainings is short and begins with a trained model."""
        judged = [row for row in self.rows if not json.loads(row["options"]).get("self_training")]
        return all(has_converged(row["loss_before"], row["loss_last"]) for row in judged)

    @property
    def seeds(self) -> set[int]:
        return {row["seed"] for row in self.rows}

    def of_seeds(self, seeds: set[int]) -> "Cell":
        return Cell([row for row in self.rows if row["seed"] in seeds], self.score)

    def counts(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """Errors and lengths of every clip (N, 2), the errors as means over seeds."""
        rows = [row for row in self.rows if seeds is None or row["seed"] in set(seeds)]
        edits = np.mean([row[f"{self.score}_edits"] for row in rows], axis=0)
        return np.stack([edits, rows[0][f"{self.score}_lengths"]], axis=1)

    def interval(self) -> tuple[float, float]:
        """95% interval of the mean error over seeds, clips resampled."""
        return bootstrap_interval(self.counts(), RESAMPLES)


Cells = dict[str, dict[str, Cell]]  # by arm, in the order of the YAML, and label size


def has_converged(before: float | None, last: float | None) -> bool:
    """Whether the training loss hardly fell any more: its mean in the last fifth against that in the fifth before."""
    if before is None or last is None:
        return False
    return before - last < max(CONVERGED_SHARE * before, CONVERGED_LOSS)


def relative_reduction(cell: Cell, baseline: Cell) -> dict | None:
    """How much lower the error is than the baseline's, as a share of that, over the seeds that both have.

    Returns:
        `reduction`; `low` and `high`, its 95% percentile interval, the same clips resampled for both and all seeds;
        `seeds`. None without a seed in common.
    """
    seeds = sorted({row["seed"] for row in cell.rows} & {row["seed"] for row in baseline.rows})
    if not seeds:
        return None
    if cell.rows[0]["clips"] != baseline.rows[0]["clips"]:
        raise ValueError(f"{cell.rows[0]['run']} and {baseline.rows[0]['run']} were scored on different clips")
    both = np.concatenate([cell.counts(seeds), baseline.counts(seeds)], axis=1)

    def reductions(sums: np.ndarray) -> np.ndarray:
        return 1 - sums[:, 0] / np.maximum(sums[:, 2], 1e-9)

    low, high = np.percentile(reductions(resample(both, RESAMPLES, 0)), [2.5, 97.5])
    point = reductions(both.sum(0, keepdims=True))[0]
    return {"reduction": float(point), "low": float(low), "high": float(high), "seeds": len(seeds)}


def minutes_needed(curve: list[tuple[float, float]], error: float) -> tuple[str, float]:
    """Minutes of labels at which a curve reaches an error, straight between its points over the logarithm of minutes.

    Args:
        curve: (minutes, error), of two points at least or one.

    Returns:
        "=" and the minutes; ">" and the most there are, where the curve never reaches it; "<" and the fewest, where it
        is there from the beginning.
    """
    curve = sorted(curve)
    if curve[0][1] <= error:
        return "<", curve[0][0]
    for (few, worse), (many, better) in zip(curve, curve[1:]):
        if better <= error:
            share = (worse - error) / (worse - better)
            return "=", float(np.exp(np.log(few) + share * (np.log(many) - np.log(few))))
    return ">", curve[-1][0]


def collect(rows: list[dict], config: dict, tier: str, phase: str, table: str, score: str) -> Cells:
    """Of each cell the newest recipe, one row for each seed."""
    same = same_in_both_tables(config)
    chosen: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        tables = {table, "updates"} if row["arm"] in same else {table}
        if row["tier"] == tier and row["phase"] == phase and row["table"] in tables:
            chosen.setdefault((row["arm"], row["labels"]), []).append(row)
    order = {name: place for place, name in enumerate(config["arms"])}
    cells: Cells = {}
    for arm, labels in sorted(chosen, key=lambda key: order.get(key[0], len(order))):
        found = chosen[arm, labels]
        by_seed = {row["seed"]: row for row in found if row["recipe"] == found[-1]["recipe"]}
        cells.setdefault(arm, {})[labels] = Cell([by_seed[seed] for seed in sorted(by_seed)], score)
    return cells


def sizes_of(cells: Cells) -> list[str]:
    """Label sizes, fewest minutes first."""
    minutes = {size: cell.minutes for own in cells.values() for size, cell in own.items()}
    return sorted(minutes, key=minutes.get)


def error_table(cells: Cells, config: dict) -> list[str]:
    """Rows of arms, columns of label sizes; arms of a length of their own are marked."""
    marked, whole = of_own_length(config) | measured_in_time(config), whole_budgets(config)
    held_against = baselines(config)
    sizes = sizes_of(cells)
    best = {size: min(own[size].mean for own in cells.values() if size in own) for size in sizes}
    minutes = {size: next(own[size].minutes for own in cells.values() if size in own) for size in sizes}
    heads = [f"{size} ({minutes[size]:.0f} min)" if size == "all" else f"{size} min" for size in sizes]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (1 + len(sizes)) + "|"]
    for arm, own in cells.items():
        shown = []
        for size in sizes:
            if size not in own:
                shown.append("")
                continue
            cell = own[size]
            text = f"{cell.mean:.1%}" + ("" if cell.spread is None else f" ± {100 * cell.spread:.1f}")
            text += f" (n={len(cell.rows)})"
            text += "" if cell.has_converged and best[size] < USEFUL else " †"
            for name, sign in (("scratch", ""), (whole.get(arm), "whole ")):
                baseline = cells.get(name, {}).get(size)
                if baseline is None or arm in held_against:
                    continue
                if found := relative_reduction(cell, baseline):
                    text += f"; {sign}{describe_reduction(found)}"
                    text += "" if found["seeds"] == len(cell.rows) else f" (n={found['seeds']})"
                    text += "" if baseline.has_converged else " †"
            shown.append(text)
        lines.append(f"| {arm}{' ‡' if arm in marked else ''} | " + " | ".join(shown) + " |")
    return lines


def describe_reduction(found: dict) -> str:
    """Such as "−31% [−38, −22]", of the error."""

    def points(share: float) -> str:
        return f"{round(-100 * share):+d}".replace("-", "−")

    return f"{points(found['reduction'])}% [{points(found['high'])}, {points(found['low'])}]"


def cost_table(cells: Cells) -> list[str]:
    """What the pre-training of each arm took, and what else its encoder is worth where that was measured: means over
    seeds, with the fewest labels, where the encoder is made for a label size."""
    lines = [
        "| arm | hours of audio seen | updates | pre-training, CPU minutes | wall minutes | parameters | "
        "probe accuracy | ABX error | few-shot |",
        "|---" * 9 + "|",
    ]
    for arm, own in cells.items():
        rows = min(own.values(), key=lambda cell: cell.minutes).rows

        def mean(column: str, form: str, scale: float = 1.0, rows=rows) -> str:
            found = [row[column] for row in rows if row.get(column) is not None]
            return format(scale * float(np.mean(found)), form) if found else ""

        values = [
            mean("audio_hours", ".2f"),
            mean("updates", ".0f"),
            mean("pretraining_cpu_seconds", ".1f", 1 / 60),
            mean("pretraining_wall_seconds", ".1f", 1 / 60),
            mean("parameters", ".2f", 1e-6) + " M",
            mean("probe_accuracy", ".1%"),
            mean("abx_error", ".1%"),
            mean("few_shot", ".1%"),
        ]
        lines.append(f"| {arm} | " + " | ".join(values) + " |")
    return lines


def describe_runs(cells: Cells) -> str:
    """Machines and commits of all rows, the newest first."""
    rows = [row for own in cells.values() for cell in own.values() for row in cell.rows]
    rows.sort(key=lambda row: row["finished"], reverse=True)
    machines = dict.fromkeys(machine_of(row["machine"]) for row in rows)
    commits = dict.fromkeys(row["commit"] or "no repository" for row in rows)
    return f"{'; '.join(machines)}. Commits {', '.join(commits)}"


def needed_table(cells: Cells, config: dict) -> list[str]:
    """Minutes of labels that scratch needs, over the seeds that both have, to match each arm at its smallest size."""
    if len(cells.get("scratch", {})) < 2:
        return []
    mark = "" if all(cell.has_converged for cell in cells["scratch"].values()) else " †"
    lines = [f"| arm | its labels | scratch{mark} needs | times |", "|---|---|---|---|"]
    for arm, own in cells.items():
        if arm not in baselines(config):
            cell = min(own.values(), key=lambda cell: cell.minutes)
            seeds = set.intersection(*(each.seeds for each in [cell, *cells["scratch"].values()]))
            if not seeds:
                continue
            same = [scratch.of_seeds(seeds) for scratch in cells["scratch"].values()]
            curve = [(scratch.minutes, scratch.mean) for scratch in same]
            sign, minutes = minutes_needed(curve, cell.of_seeds(seeds).mean)
            sign = "" if sign == "=" else f"{sign} "
            lines.append(
                f"| {arm} | {cell.minutes:.1f} min | {sign}{minutes:.1f} min | {sign}{minutes / cell.minutes:.1f}× |"
            )
    return lines


def plot(cells: Cells, name: str, clock: str, dashed: set[str], folder: Path, stem: str) -> list[str]:
    """Error against labels, hours of audio seen and minutes of computing (cpu or wall); the files' names."""
    colours = dict(zip(cells, plt.get_cmap("tab20").colors * (1 + len(cells) // 20)))
    files = []

    def save(figure, axes, kind: str, label: str) -> None:
        axes.set(xlabel=label, ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        files.append(f"{stem}_{kind}.png")
        figure.savefig(folder / files[-1], dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(figure)

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for arm, own in cells.items():
        points = sorted(own.values(), key=lambda cell: cell.minutes)
        errors, intervals = np.array([cell.mean for cell in points]), np.array([cell.interval() for cell in points])
        axes.errorbar(
            [cell.minutes for cell in points],
            errors,
            np.maximum(0, [errors - intervals[:, 0], intervals[:, 1] - errors]),
            label=arm,
            color=colours[arm],
            linestyle="--" if arm in dashed else "-",
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=1,
        )
    axes.set_xscale("log")
    save(figure, axes, "labels", "minutes of labels")

    size = sizes_of(cells)[0]
    for kind, column, scale, label in (
        ("hours", "audio_hours", 1.0, "hours of audio seen in pre-training"),
        ("compute", f"pretraining_{clock}_seconds", 1 / 60, f"minutes of pre-training, {clock} time"),
    ):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for arm, own in cells.items():
            if size in own:
                cell = own[size]
                place = scale * float(np.mean([row[column] for row in cell.rows]))
                if place == 0:
                    axes.axhline(cell.mean, color=colours[arm], linestyle="--", linewidth=1, label=arm)
                else:
                    axes.plot(place, cell.mean, "o", color=colours[arm], label=arm)
        save(figure, axes, kind, f"{label} ({size if size == 'all' else f'{size} min of'} labels)")
    return files


def write_report(rows: list[dict], config: dict, folder: Path) -> str:
    """Write report.md and its plots into the folder; returns the text."""
    parts = ["# Comparison of objectives"]
    found = sorted({(row["tier"], row["phase"], row["table"]) for row in rows if row["tier"] in config["tiers"]})
    if unknown := sorted({row["tier"] for row in rows} - set(config["tiers"])):
        logger.warning("not in the report: rows of %s, which the YAML does not have", ", ".join(unknown))
    for tier, phase, table in found:
        scores = config["tiers"][tier]["scores"]
        clock = clock_of(config["tiers"][tier])
        scored = "test" if phase == "final" else "validation"
        parts.append(f"## {tier}, {scored}, equal {table}")
        for score in scores:
            cells = collect(rows, config, tier, phase, table, score)
            name = NAMES.get((tier, score), score.upper())
            parts += ["\n".join([f"**{name[0].upper()}{name[1:]}**", "", *error_table(cells, config)])]
            if needed := needed_table(cells, config):
                parts.append("\n".join(["Labels that scratch needs for the same error:", "", *needed]))
            stem = f"{tier}_{phase}_{table}_{score}"
            files = plot(cells, f"{name}, {scored}", clock, baselines(config), folder, stem)
            parts.append("\n".join(f"![{file}]({file})" for file in files))
        parts.append("\n".join(cost_table(cells)))
        parts.append(f"Run on {describe_runs(cells)}.")
    if found:
        parts.append(
            "Mean over n seeds ± standard deviation; change of the error against scratch (and against scratch with the "
            "whole budget of the arm, where it was run) in percent of it, with paired bootstrap 95% "
            "intervals over clips. † does not count: fine-tuning had not converged (behind a change: that of scratch), "
            f"or the best arm's error is {USEFUL:.0%} or more. ‡ of a length of its own, not with as many updates as "
            "the others; of self-trained arms convergence is not judged."
        )
    else:
        parts.append("No run is finished.")
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text
