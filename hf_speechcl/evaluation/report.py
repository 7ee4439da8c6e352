"""Results of an evaluation → one HTML file that shows them, with nothing outside of it."""

import base64
import io
from pathlib import Path

import datasets
import jinja2
import numpy as np
import soundfile

from ..data.audio import read_audio
from .asr import align

TEMPLATE = Path(__file__).with_name("report_template.html")
WORST_CLIPS = 50
MAX_SLICES = 40
MAX_PLAYER_SECONDS = 60.0
PLAYER_RATE = 16000


def write_report(results: dict, corpus: datasets.Dataset, file: Path) -> None:
    """Write the report: rates, slices, frequent errors, a histogram, and the worst clips to listen to.

    Args:
        results: as `scripts/evaluate.py` writes them.
        corpus: rows with the id and audio of the clips.
        file: of the report.
    """
    worst = sorted(results["transcripts"], key=lambda clip: (-_rate(clip), -len(clip["errors"]), clip["id"]))
    worst = [clip for clip in worst if clip["errors"]][:WORST_CLIPS]
    rows = {name: row for row, name in enumerate(corpus["id"])}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": "{:.1%}".format, "points": _points, "describe": describe_pair}
    slices = {name: _with_intervals(entries[:MAX_SLICES]) for name, entries in results["slices"].items()}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        words=sum(len(clip["reference"].split()) for clip in results["transcripts"]),
        slices=slices,
        left_out={name: max(len(entries) - MAX_SLICES, 0) for name, entries in results["slices"].items()},
        histogram=histogram([_rate(clip) for clip in results["transcripts"]]),
        worst=[
            clip
            | {"pairs": align(clip["reference"], clip["hypothesis"]), "rate": _rate(clip)}
            | {"audio": embed_audio(corpus[rows[clip["id"]]]["audio"])}
            for clip in worst
        ],
        max_player_seconds=MAX_PLAYER_SECONDS,
    )
    file.write_text(page, encoding="utf-8")


def _rate(clip: dict) -> float:
    return len(clip["errors"]) / len(clip["reference"].split())


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def describe_pair(pair: tuple[str | None, str | None]) -> str:
    """What a pair of `align` is: equal, substitution, deletion or insertion."""
    reference, hypothesis = pair
    if hypothesis is None:
        return "deletion"
    if reference is None:
        return "insertion"
    return "equal" if reference == hypothesis else "substitution"


def histogram(rates: list[float]) -> list[dict]:
    """Clips by their WER: none, each tenth up to 100%, and above; `{"label", "clips", "height"}`, height in 0 to 1."""
    edges = np.arange(11) / 10
    bins = np.searchsorted(edges, np.round(rates, 9), side="left")  # (0, 0.1] is bin 1
    counts = np.bincount(bins, minlength=12)
    labels = ["0%", *(f"{10 * low}–{10 * low + 10}%" for low in range(10)), "> 100%"]
    highest = counts.max()
    return [{"label": label, "clips": int(n), "height": float(n / highest)} for label, n in zip(labels, counts)]


def _with_intervals(entries: list[dict]) -> list[dict]:
    """Slices with the places, 0 to 1, of their rates and intervals on the axis that all of a table share."""
    end = max([entry["wer"] for entry in entries] + [entry["wer_high"] or 0 for entry in entries]) or 1.0
    return [
        entry
        | {"at": entry["wer"] / end, "from": (entry["wer_low"] or 0) / end, "to": (entry["wer_high"] or 0) / end}
        | {"has_interval": entry["wer_low"] is not None}
        for entry in entries
    ]


def embed_audio(audio: dict) -> str:
    """The first minute of a clip `{"bytes", "path"}` as Ogg/Opus in a data URL."""
    stream = io.BytesIO()
    samples = read_audio(audio, PLAYER_RATE, duration=MAX_PLAYER_SECONDS)
    soundfile.write(stream, np.clip(samples, -1, 1), PLAYER_RATE, format="OGG", subtype="OPUS")
    return f"data:audio/ogg;base64,{base64.b64encode(stream.getvalue()).decode()}"
