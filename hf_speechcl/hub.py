"""What stands beside the weights: the model card and the picture of the curves."""

import math
import platform
from importlib.metadata import version
from pathlib import Path

import datasets
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__
from .configuration_speechcl import SpeechCLConfig

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CURVES = "curves.png"
PLOTTED = ("loss", "accuracy", "code_perplexity", "encoder_std", "encoder_rank", "wer", "cer")

USE_ENCODER = """```python
import hf_speechcl  # or trust_remote_code=True in from_pretrained, without the package
from transformers import AutoModel, AutoModelForCTC

encoder = AutoModel.from_pretrained("{name}")      # frame-level features
model = AutoModelForCTC.from_pretrained("{name}")  # the encoder with a new CTC head, to be fine-tuned
```

Fine-tune it on transcribed speech:

```bash
python scripts/finetune_ctc.py --model {name} --corpus FOLDER_WITH_METADATA_CSV --output_dir runs/ctc
```"""

USE_CTC = """```python
from transformers import pipeline

recognizer = pipeline("automatic-speech-recognition", model="{name}", trust_remote_code=True)
print(recognizer("speech.wav", return_timestamps="word"))
```

`trust_remote_code=True` is not needed after `import hf_speechcl`. {chunks}"""


def describe_chunks(config: SpeechCLConfig) -> str:
    """One sentence on how long recordings are transcribed in chunks."""
    if config.sliding_window is None:
        return "Long recordings: add `chunk_length_s=20`; the text may differ a little where chunks meet."
    frame = config.inputs_to_logits_ratio / config.sampling_rate
    stride = math.ceil((config.num_hidden_layers * config.sliding_window + 2) * frame)
    return (
        f"Long recordings: add `chunk_length_s={6 * stride}, stride_length_s={stride}`; a frame sees less than "
        f"{stride} s to either side, so the text is that of the whole recording (but for its last 20 ms, which the "
        "pipeline may cut)."
    )


def source_name(source: str) -> str:
    """A corpus as a card may name it: a Hub name as it is, a local path by its last part."""
    return Path(source).name if Path(source).exists() else source


def data_row(sources: list[str], split: str, corpus: datasets.Dataset) -> dict:
    """A row of the card's table of data."""
    hours = f"{sum(corpus['duration']) / 3600:.2f}"
    return {"corpus": ", ".join(map(source_name, sources)), "split": split, "clips": len(corpus), "hours": hours}


def describe_model(config: SpeechCLConfig, num_parameters: int) -> str:
    """One paragraph on the architecture."""
    frame = 1000 * config.inputs_to_logits_ratio / config.sampling_rate
    reach = "all frames" if config.sliding_window is None else f"{config.sliding_window} frames to either side"
    return (
        f"Log-mel ({config.num_mel_bins} bins), convolutional subsampling by {config.subsampling_factor} (a frame each "
        f"{frame:g} ms), pre-norm Transformer with rotary positions: {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {config.num_attention_heads} heads, attention to {reach}; {num_parameters / 1e6:.3g} "
        "million parameters."
    )


def describe_run(args, max_seconds_per_batch: float, runtime_seconds: float, num_updates: int) -> str:
    """One paragraph on how a model was trained and on what."""
    batch = max_seconds_per_batch * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32"
    since = " since it was last resumed" if args.resume_from_checkpoint else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "accelerate"))
    return (
        f"{num_updates} updates of up to {batch:g} s of audio, AdamW, highest learning rate {args.learning_rate:g}, "
        f"{precision}, seed {args.seed}; {runtime_seconds / 60:.1f} minutes{since} on {args.world_size} process(es), "
        f"device {args.device.type} ({platform.machine()}). hf_speechcl {__version__}, {packages}."
    )


def metrics_table(metrics: dict[str, float]) -> str:
    """A table of scalars."""
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def plot_curves(runs: dict[str, list[dict]], file: Path) -> None:
    """Draw losses, accuracies and error rates against updates.

    Args:
        runs: a Trainer's log for every label; training and validation are drawn into the same panels.
        file: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for label, log_history in runs.items():
        for entry in log_history:
            for name, value in entry.items():
                part, key = ("validation", name[5:]) if name.startswith("eval_") else ("training", name)
                if key.rsplit("/")[-1] in PLOTTED and key != "loss":
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
        axis.set(title=name, xlabel="updates")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_card(
    folder: Path,
    *,
    usage: str,
    tags: list[str],
    pipeline_tag: str | None = None,
    eval_results: list[EvalResult] | None = None,
    **sections,
) -> None:
    """Write README.md into `folder` from the template; `sections` fill the rest of its fields."""
    card_data = ModelCardData(
        library_name="transformers",
        tags=["speech", "hf_speechcl", *tags],
        pipeline_tag=pipeline_tag,
        model_name=folder.name,
        eval_results=eval_results,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        usage=usage.replace("{name}", folder.name if folder.is_absolute() else folder.as_posix()),
        curves=CURVES if (folder / CURVES).is_file() else None,
        **sections,
    )
    card.save(folder / "README.md")
