"""Shared fixtures: a very small encoder, real clips of the embedded corpus, and a home of its own for every cache."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers.utils.hub
from huggingface_hub import constants

import hf_speechcl.hub
from hf_speechcl import OBJECTIVES, SpeechCLConfig, load_corpus
from hf_speechcl.data import PretrainingCollator
from hf_speechcl.data.audio import read_audio
from hf_speechcl.data.collators import float_waveforms
from hf_speechcl.objectives import UtteranceObjective
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.pretrain import main as pretrain
from tests.local_hub import FakeHub

try:
    import kenlm
    import pyctcdecode
except ImportError:
    kenlm = pyctcdecode = None

needs_lm = pytest.mark.skipif(pyctcdecode is None, reason="the extra lm is not installed")
ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [
    line.split()
    for line in (
        "the cat sat on the mat",
        "the dog sat on the cat",
        "a cat sat",
        "the mat",
        "a dog and a cat and the mat",
        "the cat sat on a dog",
        "on the mat sat the dog",
        "and",
    )
]  # of an n-gram
os.environ["PYTHONPATH"] = str(ROOT)  # scripts run in processes of their own test this checkout, not an installed one
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": 24,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "final_dropout": 0.0,
}
SMALL_OBJECTIVES = {
    "info_nce": {"weight": 1.0, "proj_dim": 12},
    "siamese": {"weight": 1.0, "proj_dim": 12},
    "triplet": {"weight": 1.0, "proj_dim": 12},
    "prototypical": {"weight": 1.0, "n_way": 3, "n_query": 2, "proj_dim": 12},
    "cpc": {"weight": 1.0, "num_steps": 3, "num_negatives": 5},
    "wav2vec2": {"weight": 0.5, "num_negatives": 7, "codebook_size": 12, "codevector_dim": 16, "proj_dim": 16},
    "best_rq": {"weight": 1.0, "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4},
    "hubert": {"weight": 0.7, "num_units": 10, "proj_dim": 16},
    "data2vec": {"weight": 1.0, "top_layers": 2},
    "denoising": {"weight": 1.0},
    "masked_reconstruction": {"weight": 1.0},
}
COMPARING = [name for name, objective in OBJECTIVES.items() if issubclass(objective, UtteranceObjective)]
# The options of a run of seconds, for the scripts.
FAST_RUN = (
    "--use_cpu --disable_tqdm True --max_seconds_per_batch 12 --logging_steps 1 "
    "--eval_strategy no --save_strategy no --report_to none"
).split()
SHORT_RUN = [*FAST_RUN[:-6], "--logging_steps", "1", "--report_to", "none"]  # validates and saves
TOKEN = "hf_test"  # may write to the local Hub
TINY_OPTIONS = [f"{name}={value}" for name, value in TINY.items()]


def units_of(index: int, num_frames: int) -> np.ndarray:
    """Made-up units of a clip, for `SMALL_OBJECTIVES["hubert"]`."""
    return np.random.default_rng(index).integers(SMALL_OBJECTIVES["hubert"]["num_units"], size=num_frames)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus():
    """The embedded corpus' validation split."""
    return load_corpus("demo", "validation")


@pytest.fixture(scope="session")
def clips(corpus):
    """Five real clips of unequal length, float32 at 16 kHz."""
    order = np.argsort(corpus["duration"])
    return [read_audio(corpus[int(order[place])]["audio"], 16000) for place in (2, 15, 30, 45, 52)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one user, tester, that this process and those it starts talk to."""
    hub = FakeHub(tmp_path / "hub").start()
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # a client that is kept, with the Hub of another test
    monkeypatch.setattr(hf_speechcl.hub, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    yield hub
    hub.stop()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folders of an encoder and of a recogniser, each trained for three updates."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(
        ["--output_dir", str(folder / "encoder"), "--max_steps", "3", "--encoder_options", *TINY_OPTIONS,
         "--objectives", "best_rq", "prototypical", *FAST_RUN]
    )  # fmt: skip
    finetune_ctc(
        ["--model", str(folder / "encoder"), "--output_dir", str(folder / "ctc"), "--max_steps", "3", *FAST_RUN]
    )
    return folder


@pytest.fixture
def config():
    return SpeechCLConfig(**TINY)


@pytest.fixture
def pretraining_config():
    """All objectives at once."""
    return SpeechCLConfig(**TINY, objectives=SMALL_OBJECTIVES)


def quieter(clip, rng):
    """A corruption that is told apart from the clean clip at once."""
    return (clip * rng.uniform(0.1, 0.5)).astype(np.float32)


def make_collator(model, **options):
    """A collator as the objectives of a `SpeechCLForPreTraining` need it."""
    return PretrainingCollator(
        model._get_feat_extract_output_lengths,
        corruption=quieter,
        units=units_of,
        **{**model.collator_options(), **options},
    )


def as_items(clips, labels=None):
    """Waveforms as a `SpeechDataset` would give them."""
    return [
        {"index": number, "label": number if labels is None else labels[number], "seed": (0, 0, number)}
        | {"input_values": clip}
        for number, clip in enumerate(clips)
    ]


def make_batch(model, clips, labels=None, **options):
    """A batch as the trainer gives it to the model."""
    batch = make_collator(model, **options)(as_items(clips, labels))
    batch.pop("num_skipped")
    return float_waveforms(batch)


def wav_bytes(samples, rate=16000, subtype="PCM_16", format="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=format)
    return buffer.getvalue()


@pytest.fixture
def audio_folder(tmp_path, clips):
    """A folder of four WAV files with metadata.csv."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for number, clip in enumerate(clips[:4]):
        soundfile.write(folder / f"clip{number}.wav", clip, 16000)
    lines = ["file_name,text", *(f"clip{number}.wav,text number {number}" for number in range(4))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def run_script(
    name: str, *arguments, check: bool = True, env: dict | None = None, cwd=None
) -> subprocess.CompletedProcess:
    """Run a script of the repository in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, **(env or {})},
    )
    if check and result.returncode:
        raise AssertionError(f"{name} {arguments} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def launch(script, *arguments):
    """Run a script on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the comparison, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmarks"))
    names = ("tiers", "recipes", "processes", "chains", "comparison_report", "objectives", "peer", "few_shot")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder for the comparison, with the columns of the real one, of short clips of the embedded corpus."""
    folder = tmp_path_factory.mktemp("shared")
    clips = [row for row in load_corpus("demo").to_list() if 0.6 < row["duration"] < 2.0 and len(row["text"]) > 3][:80]

    def write(name, rows, **columns):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        table = {key: [row[key] for row in rows] for key in ("audio", "text")}
        table["id"] = [f"{name}/{row['id']}" for row in rows]
        table["speaker"] = [f"voice {number % 2}" for number in range(len(rows))]
        table["duration"] = pyarrow.array([row["duration"] for row in rows], pyarrow.float32())
        pyarrow.parquet.write_table(pyarrow.table(table | columns), file)

    def phones(rows):
        labels = [["pau", *(letter * 2 for letter in row["text"].lower() if letter.isalpha())] for row in rows]
        ends = [
            [row["duration"] * place / len(found) for place in range(1, len(found) + 1)]
            for row, found in zip(rows, labels)
        ]
        return {"phones": labels, "phone_ends": ends}

    write("pool/train-0.parquet", clips[:12], source=["festvox-ru"] * 8 + ["other"] + ["asterisk-core-sounds-fr"] * 3)
    write("phones_ru/train.parquet", clips[:60], **phones(clips[:60]))
    write("phones_ru/test.parquet", clips[60:64], **phones(clips[60:64]))
    for name in ("prompts_en", "queen_en"):
        write(f"{name}/train.parquet", clips[:20])
        write(f"{name}/validation.parquet", clips[64:70])
        write(f"{name}/test.parquet", clips[70:])
    return folder
