"""The picture of a run: losses, accuracies and error rates against updates."""

from pathlib import Path

CURVES = "curves.png"
PLOTTED = "loss accuracy code_perplexity encoder_std encoder_rank wer cer phone_accuracy abx_error".split()


def plot_curves(runs: dict[str, list[dict]], file: Path) -> None:
    """Draw losses, accuracies and error rates against updates.

    Args:
        runs: a Trainer's log for every label; training and validation are drawn into the same panels, and what the
            probe finds in log-mel frames as a level line into those of the encoder.
        file: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    levels: dict[tuple[str, str], float] = {}
    for label, log_history in runs.items():
        for entry in log_history:
            for name, value in entry.items():
                part, key = ("validation", name[5:]) if name.startswith("eval_") else ("training", name)
                if key.startswith("probe_log_mel/"):
                    levels[f"{label} log-mel".strip(), key.rsplit("/")[-1]] = value
                elif key.rsplit("/")[-1] in PLOTTED and key != "loss":
                    curve = panels.setdefault(key, {}).setdefault(f"{label} {part}".strip(), [])
                    curve.append((entry["step"], value))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, curves) in zip(axes.flat, panels.items()):
        for part, points in curves.items():
            axis.plot(*zip(*points), label=part, marker="." if len(points) < 30 else None)
        for (part, metric), value in levels.items():
            if name.startswith("probe/") and name.rsplit("/")[-1] == metric:
                axis.axhline(value, label=part, color="gray", linestyle="--")
        axis.set(title=name, xlabel="updates")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)
