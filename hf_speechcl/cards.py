"""Model cards: what a model is, how to use it, what it was trained on, how good it is; the picture of its curves."""

import logging
import math
import platform
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HTTPError, OfflineModeIsEnabled
from transformers.training_args import OptimizerNames
from yaml import YAMLError

from . import __version__
from .citations import bibtex
from .configuration_speechcl import SpeechCLConfig
from .curves import CURVES
from .data.audio import AudioError, read_sampling_rate
from .data.folders import is_local, source_name
from .pretraining import objective_options

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD = "README.md"
RESULTS_BEGIN, RESULTS_END = "<!-- results of scripts/evaluate.py -->", "<!-- end of results -->"
NOT_STATED = "not stated by the author of this model"
DEMO_LICENSE = (
    "[CC-BY-SA-3.0](https://creativecommons.org/licenses/by-sa/3.0/). Asterisk Core Sounds (English), copyright "
    "2003-2010 Allison Smith, recorded by Allison Smith (http://www.theivrvoice.com), financial contributions by "
    "Digium, Inc. (http://www.digium.com); changes: trimmed, recoded from G.722 to Opus, packed in Parquet"
)
# What the Hub accepts in the field `license` of a card.
LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl
    odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib""".split()
)

USE_ENCODER = """Features of a recording, one vector each {frame} ms:

```python
import soundfile
import torch
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{name}", trust_remote_code=True)
waveform, rate = soundfile.read("speech.wav", dtype="float32")  # one channel, {sampling_rate} Hz
with torch.no_grad():
    features = encoder(torch.from_numpy(waveform)[None]).last_hidden_state  # (1, frames, {hidden_size})
```

A recogniser to be fine-tuned with your own `Trainer`, the encoder with a new CTC head:

```python
from transformers import AutoModelForCTC

model = AutoModelForCTC.from_pretrained("{name}", trust_remote_code=True, vocab_size=32)
```

With the package hf_speechcl, fine-tune it on a folder of recordings with a `metadata.csv` (columns `file_name` and
`text`); for minutes of them on a CPU there is `--config scripts/configs/cpu-ctc.yaml`, in place of `--max_steps 1000`:

```bash
python scripts/finetune_ctc.py --model "{name}" --corpus my_labelled_audio --output_dir runs/my-ctc --max_steps 1000
```

Or go on pre-training it on more audio, without text:

```bash
python scripts/pretrain.py --encoder "{name}" --objectives {objectives} {masks} \\
  --corpus my_audio --output_dir runs/more --max_steps 1000
```"""

USE_CTC = """```python
from transformers import pipeline

recognizer = pipeline("automatic-speech-recognition", model="{name}", trust_remote_code=True)
print(recognizer("speech.wav", return_timestamps="word"))  # opening files needs ffmpeg; arrays need nothing
```

{chunks}

The model and its processor, for scores of every frame:

```python
import soundfile
import torch
from transformers import AutoModelForCTC, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCTC.from_pretrained("{name}", trust_remote_code=True)
waveform, rate = soundfile.read("speech.wav", dtype="float32")  # one channel, {sampling_rate} Hz
with torch.no_grad():
    logits = model(**processor(waveform, sampling_rate=rate, return_tensors="pt")).logits  # (1, frames, {vocab_size})
print(processor.batch_decode(logits.argmax(-1)))
```

With the package hf_speechcl, go on fine-tuning it on a folder of recordings with a `metadata.csv` (columns `file_name`
and `text`):

```bash
python scripts/finetune_ctc.py --model "{name}" --corpus my_labelled_audio --output_dir runs/my-ctc --max_steps 1000
```"""

USE_CLASSIFIER = """```python
from transformers import pipeline

classifier = pipeline("audio-classification", model="{name}", trust_remote_code=True)
print(classifier("speech.wav"))  # opening files needs ffmpeg; arrays need nothing
```"""


def describe_chunks(config: SpeechCLConfig) -> str:
    """One sentence on how long recordings are transcribed in chunks."""
    if config.sliding_window is None:
        return "Long recordings: add `chunk_length_s=20`; the text may differ a little where chunks meet."
    frame = config.inputs_to_logits_ratio / config.sampling_rate
    stride = math.ceil((config.layer_reach + 2) * frame)
    return (
        f"Long recordings: add `chunk_length_s={6 * stride}, stride_length_s={stride}`; a frame sees less than "
        f"{stride} s to either side, so the text is that of the whole recording (but for its last 20 ms, which the "
        "pipeline may cut)."
    )


def data_row(sources: list[str], split: str, corpus: datasets.Dataset) -> dict:
    """A row of the card's table of data."""
    hours = f"{sum(corpus['duration']) / 3600:.2f}"
    chosen = np.linspace(0, len(corpus) - 1, num=min(20, len(corpus)), dtype=int)
    rates = set()
    for row in chosen:
        with suppress(AudioError):
            rates.add(read_sampling_rate(corpus[int(row)]["audio"]))
    return {
        "corpus": ", ".join(map(source_name, sources)),
        "split": split,
        "clips": len(corpus),
        "hours": hours,
        "rates": ", ".join(f"{rate} Hz" for rate in sorted(rates)),
    }


def describe_licenses(sources: list[str], corpus_license: str | None) -> list[str]:
    """A line on the licence of every source: its own statement, else `corpus_license`, else that none was stated."""
    return [
        f"`{source_name(source)}`: {find_license(source) or corpus_license or NOT_STATED}."
        for source in dict.fromkeys(sources)
    ]


def find_license(source: str) -> str | None:
    """What a source says of its licence: a LICENSE file, or the metadata of a Hub data set's card; None if nothing."""
    if source == "demo":
        return DEMO_LICENSE
    path = Path(source).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        for file in sorted(folder.glob("LICEN[CS]E*")) + sorted(folder.glob("COPYING*")):
            if not file.is_file():
                continue
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            first = next((line.strip("#*= \t") for line in lines if line.strip("#*= \t")), "")
            return f"{first[:200]} (first line of its {file.name})"
        return None
    try:
        stated = DatasetCard.load(source.partition(":")[0]).data.get("license")
    except (HTTPError, OfflineModeIsEnabled, EntryNotFoundError, OSError, ValueError, YAMLError) as error:
        logger.warning("the licence of %s was not found: %s", source, type(error).__name__)
        return None
    return ", ".join(stated) if isinstance(stated, list) else stated


def describe_model(config: SpeechCLConfig, num_parameters: int) -> str:
    """One paragraph on the architecture."""
    frame = 1000 * config.inputs_to_logits_ratio / config.sampling_rate
    reach = "all frames" if config.sliding_window is None else f"{config.sliding_window} frames to either side"
    kernel_size = config.conv_depthwise_kernel_size
    convolution = "" if kernel_size is None else f", a convolution module of {kernel_size} frames"
    below = (
        f"convolutional subsampling by {config.subsampling_factor} (a frame each {frame:g} ms)"
        if config.perceptron_dims is None
        else f"a perceptron of {', '.join(map(str, config.perceptron_dims))} on each frame ({frame:g} ms)"
    )
    layers = (
        f"pre-norm Transformer with rotary positions: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.num_attention_heads} heads, attention to {reach}{convolution}"
        if config.num_hidden_layers
        else f"a linear layer to {config.hidden_size}, no Transformer"
    )
    return f"Log-mel ({config.num_mel_bins} bins), {below}, {layers}; {num_parameters / 1e6:.3g} million parameters."


def describe_objectives(objectives: dict[str, dict]) -> str:
    """A table of objectives with all their settings, defaults included."""
    rows = ["| objective | weight | settings |", "|---|---|---|"]
    for name, given in objectives.items():
        settings = {key: given.get(key, known.default) for key, known in objective_options(name).items()}
        listed = ", ".join(f"{key} {'none' if value is None else value}" for key, value in settings.items())
        rows.append(f"| `{name}` | {given.get('weight', 1.0):g} | {listed} |")
    return "\n".join(rows)


def describe_run(trainer, runtime_seconds: float) -> str:
    """One paragraph on how a model was trained and on what.

    Args:
        trainer: a `SpeechTrainer` whose training is over.
    """
    args, num_updates = trainer.args, trainer.state.global_step
    batch = trainer.max_seconds_per_batch * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32"
    since = " since it was last resumed" if trainer.is_resumed else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "accelerate"))
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else f"{args.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    choice = (
        f" The weights are those of update {trainer.taken_update}, the best of all checkpoints by "
        f"{args.metric_for_best_model} on the validation clips, so results on these are a little too good."
        if trainer.taken_update < num_updates
        else ""
    )
    return (
        f"{num_updates} updates of up to {batch:g} s of audio, {trainer.audio_hours:.2f} hours in all with "
        f"repetitions; optimizer {OptimizerNames(args.optim).value}, highest learning rate {args.learning_rate:g}, "
        f"{precision}, seed {args.seed}. {runtime_seconds / 60:.1f} minutes{since} on {args.world_size} process(es), "
        f"device {device}. hf_speechcl {__version__}, {packages}.{choice}"
    )


def describe_limits(hours: float, base_model: str | None) -> str:
    """What any model is limited by that has learned from `hours` of audio, and from what its base model has."""
    base = "" if base_model is None else f", after all that `{source_name(base_model)}` was trained on before,"
    return (
        f"It was trained on {hours:.2f} hours of the corpora named above{base} and knows their languages, voices and "
        "recording conditions; others, above all noise, far microphones, children and accents that they do not hold, "
        "were not tested."
    )


def metrics_table(metrics: dict[str, float]) -> str:
    """A table of scalars."""
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def data_set_fields(names: list[str]) -> dict[str, str | None]:
    """What an entry of a model-index says of its sources: of one on the Hub, user/name:config, the parts."""
    name, config = ", ".join(names), ""
    if len(names) == 1 and "/" in name:  # a name on the Hub
        name, _, config = name.partition(":")
    return {"dataset_type": name, "dataset_name": name, "dataset_config": config or None}


def error_rate_results(results: dict) -> list[EvalResult]:
    """Word and character error rates of scripts/evaluate.py as entries of a model-index, in percent."""
    about = {
        "text_normalization": results["text_normalization"],
        "decoding": results["decoding"],
        "clips": results["clips"],
        "hours": round(results["hours"], 3),
    }
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Speech recognition",
            **data_set_fields(results["corpus"]),
            dataset_split=results["split"],
            metric_type=name,
            metric_name=f"{name.upper()}, {results['decoding']}, text normalisation {results['text_normalization']}",
            metric_value=round(100 * results[name], 2),
            metric_args=about | {"interval_95": [round(100 * results[f"{name}_{end}"], 2) for end in ("low", "high")]},
        )
        for name in ("wer", "cer")
    ]


def result_key(result: EvalResult) -> tuple:
    """What a result is of, but for which metric and value."""
    args = result.metric_args or {}
    return (
        result.dataset_name,
        result.dataset_config,
        result.dataset_split,
        args.get("text_normalization"),
        args.get("decoding"),
    )


def results_table(results: list[EvalResult]) -> str:
    """A table of results, shares in percent, with their intervals."""
    rows = {}
    for result in results:
        rows.setdefault(result_key(result), {})[result.metric_type] = result
    names = list(dict.fromkeys(result.metric_type for result in results))
    columns = ["corpus", "split", "clips", "hours", "text normalisation", "decoding"]
    lines = [columns + [f"{name.upper()} [95% interval]" for name in names]]
    for (corpus, config, split, normalization, decoding), metrics in rows.items():
        args = next(iter(metrics.values())).metric_args or {}
        cells = [corpus if config is None else f"{corpus}:{config}", split, args.get("clips"), args.get("hours")]
        cells += [normalization, decoding, *(_rate(metrics.get(name)) for name in names)]
        lines.append(["" if cell is None else str(cell) for cell in cells])
    filled = [column for column in zip(*lines) if any(column[1:])]
    if not filled:
        return ""
    header, *cells = [f"| {' | '.join(line)} |" for line in zip(*filled)]
    return "\n".join([header, "|" + "---|" * len(filled), *cells])


def _rate(result: EvalResult | None) -> str:
    if result is None:
        return ""
    interval = (result.metric_args or {}).get("interval_95")
    return f"{result.metric_value:.1f}%" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def fill_results(text: str, results: list[EvalResult]) -> str:
    """The text of a card with its table of results made anew."""
    table = f"{RESULTS_BEGIN}\n{results_table(results)}\n{RESULTS_END}"
    begin, end = text.find(RESULTS_BEGIN), text.find(RESULTS_END)
    if begin < 0 or end < begin:  # a card that was written by hand
        return f"{text.rstrip()}\n\n## Results of scripts/evaluate.py\n\n{table}\n"
    return text[:begin] + table + text[end + len(RESULTS_END) :]


def rename_model(card: str, name: str) -> str:
    """A card whose code and model-index say `name` where they said what the model was called before."""
    parsed = ModelCard(card)
    former = parsed.data.model_name
    if not former:
        return card
    parsed.data.model_name = name
    parsed.text = re.sub(
        r"^```.*?^```",
        lambda block: block[0].replace(f'"{former}"', f'"{name}"'),
        parsed.text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return str(parsed)


def write_card(
    folder: Path,
    *,
    config: SpeechCLConfig,
    usage: str,
    tags: list[str],
    pipeline_tag: str,
    sources: list[str],
    methods: list[str],
    args,
    base_model: str | None = None,
    eval_results: list[EvalResult] | None = None,
    **sections,
) -> None:
    """Write README.md into `folder` from the template.

    Args:
        folder: of the model; its name stands in the code of the card until the model is published.
        usage: one of USE_ENCODER, USE_CTC and USE_CLASSIFIER.
        sources: the corpora it was trained on.
        methods: what is cited, see citations.py.
        args: training arguments, of which license, corpus_license and language count.
        base_model: what it was fine-tuned from; kept if it is the name of a model on the Hub.
        eval_results: for the model-index.
        sections: title, summary, data (rows of `data_row`), model, training, results and limits.
    """
    name = folder.name if folder.is_absolute() else folder.as_posix()
    # Units are of one corpus: hubert has none for other audio.
    objectives = {key: value for key, value in (config.objectives or {}).items() if key != "hubert"} or {"best_rq": {}}
    values = {
        "name": name,
        "frame": f"{1000 * config.inputs_to_logits_ratio / config.sampling_rate:g}",
        "sampling_rate": config.sampling_rate,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "objectives": " ".join(f"{key}={value.get('weight', 1.0):g}" for key, value in objectives.items()),
        "chunks": describe_chunks(config),
    }
    usage = re.sub(r"\{(\w+)\}", lambda field: str(values[field[1]]), usage)
    on_hub = [name.partition(":")[0] for name in dict.fromkeys(sources) if name != "demo" and not is_local(name)]
    card_data = ModelCardData(
        license=args.license,
        language=args.language or (["en"] if set(sources) == {"demo"} else None),
        library_name="transformers",
        tags=["speech", "hf_speechcl", *tags],
        pipeline_tag=pipeline_tag,
        datasets=on_hub or None,
        base_model=hub_name(base_model),
        model_name=name,
        eval_results=eval_results,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        usage=usage,
        sampling_rate=config.sampling_rate,
        licenses=describe_licenses(sources, args.corpus_license),
        license=args.license or NOT_STATED,
        curves=CURVES if (folder / CURVES).is_file() else None,
        results_begin=RESULTS_BEGIN,
        results_table=results_table(eval_results or []),
        results_end=RESULTS_END,
        citation=bibtex(methods),
        **sections,
    )
    (folder / CARD).write_text(str(card).rstrip() + "\n", encoding="utf-8")


def hub_name(model: str | None) -> str | None:
    """The name on the Hub, without a revision, of a model that was not read from a folder."""
    name = (model or "").partition("@")[0]
    return name if name.count("/") == 1 and not is_local(name) else None
