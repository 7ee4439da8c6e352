"""The benchmarks, on models and batches too small to measure anything: what they print, never how long it takes."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_speechcl import OBJECTIVES, SpeechCLConfig
from tests.conftest import ROOT, TINY, TINY_OPTIONS, run_script

SIZES = [option for option in TINY_OPTIONS if "dropout" not in option]
SMALL_RUN = ["--threads", 1, "--clips", 2, "--seconds", 0.5, "--encoder_options", *SIZES]


@pytest.fixture(scope="module")
def pretrain_step():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_step", ROOT / "scripts/benchmarks/pretrain_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in a text, each as rows by column."""
    tables = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        assert all(len(row) == len(head) for row in rows), lines
        tables.append([dict(zip(head, row)) for row in rows])
    return tables


@pytest.fixture(scope="module")
def printed():
    """What a run with models of two layers prints."""
    options = ["--sizes", "tiny", "--turn_seconds", 0.01, "--dropout", 0.05]
    options += ["--objectives", "best_rq", "hubert", "denoising", "prototypical"]
    return run_script("benchmarks/pretrain_step.py", "--quick", True, *options, *SMALL_RUN).stdout


def test_step_benchmark_names_date_processor_threads_and_versions_first(printed):
    assert re.match(
        r"\d{4}-\d\d-\d\d, .+, 1 threads of \d+ cores, Python [\d.]+, torch \S+, transformers \S+\n", printed
    )


def test_every_row_of_the_step_benchmark_says_what_was_measured(printed):
    (rows,) = read_tables(printed)
    for row in rows:
        assert row["model"] in ("SpeechCL", "Wav2Vec2ForPreTraining")
        assert row["dtype"] in ("float32", "bf16 autocast")
        assert row["frames/s"] in ("25", "50")
        assert row["dropout"] == "0.05"
        assert row["optimizer"] == "fused AdamW"
        assert row["front end"].startswith("log-mel" if row["model"] == "SpeechCL" else "waveform")
        assert float(row["audio s per s"]) > 0
        assert float(row["peak MiB"]) > float(row["of it the step's"]) > 0
        assert float(row["GFLOP per audio s"]) > 0


def test_step_benchmark_has_every_objective(pretrain_step):
    for quick, times in ((True, 1), (False, 2)):
        first, *_ = pretrain_step.plan(pretrain_step.Arguments(quick=quick))
        objectives = [job.objective for job in first if job.model == pretrain_step.OURS]
        assert set(objectives) == set(OBJECTIVES)
        assert objectives.count("cpc") == times


def test_peer_is_run_in_both_dtypes_and_compared_with_itself(printed):
    (rows,) = read_tables(printed)
    peers = [row for row in rows if row["model"] != "SpeechCL"]
    assert [row["dtype"] for row in peers] == ["float32", "bf16 autocast"]
    assert peers[0]["× peer float32"] == peers[1]["× peer bf16"] == "1"


def test_ratio_to_the_peer_is_that_of_audio_per_second(printed):
    (rows,) = read_tables(printed)
    peer = next(row for row in rows if row["model"] != "SpeechCL" and row["dtype"] == "bf16 autocast")
    for row in rows:
        expected = float(row["audio s per s"]) / float(peer["audio s per s"])
        assert float(row["× peer bf16"]) == pytest.approx(expected, rel=0.02)


def test_growth_in_utterances_keeps_the_seconds_of_a_batch_and_draws_what_grows(pretrain_step, tmp_path):
    sweeps = pretrain_step.plan_growth(pretrain_step.Arguments(sizes=["tiny"]))
    lengths, batches, codebooks, negatives = sweeps.values()
    assert {job.audio_seconds for job in lengths} == {60}
    assert [job.clip_seconds for job in lengths] == [job.grows for job in lengths] == [5, 10, 15, 20, 30, 60]
    assert [job.audio_seconds for job in batches] == [job.grows for job in batches] == [10, 20, 40, 80]
    assert codebooks[-1].objective == "best_rq, num_codebooks=32"
    assert negatives[-1].objective == "wav2vec2, num_negatives=400"
    measured = {
        name: [pretrain_step.Measurement(job, {}, seconds=[1.0, 2.0], peak_mib=100.0) for job in jobs]
        for name, jobs in sweeps.items()
    }
    pretrain_step.plot_growth(measured, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_fails_is_a_row_that_says_why(pretrain_step):
    args = pretrain_step.Arguments(sizes=["tiny"], objectives=["best_rq"])
    (jobs,) = pretrain_step.plan(args)
    measurements = [pretrain_step.Measurement(job, {}, flops=1.0, seconds=[1.0]) for job in jobs]
    measurements[-1] = pretrain_step.Measurement(jobs[-1], {}, error="exit code -9, out of memory?")
    (rows,) = read_tables("\n".join(pretrain_step.table(measurements)))
    assert rows[-1]["step ms: median (p10–p90)"] == "exit code -9, out of memory?"
    assert rows[-1]["audio s per s"] == ""
    assert rows[0]["audio s per s"] == "20"


def test_step_benchmark_refuses_what_it_does_not_know(pretrain_step):
    with pytest.raises(ValueError, match=r"sizes: expected of tiny, small, base, large, found \['tiny', 'huge'\]"):
        pretrain_step.Arguments(sizes=["tiny", "huge"])
    with pytest.raises(ValueError, match="rounds must be positive, found 0"):
        pretrain_step.Arguments(rounds=0)


def test_flops_of_a_grouped_convolution_are_those_of_its_products(pretrain_step):
    layer = nn.Conv1d(8, 12, kernel_size=3, groups=4, padding=1, bias=False)
    inputs = torch.ones(2, 8, 10, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=pretrain_step.FLOP_FORMULAS) as counter:
        layer(inputs).sum().backward()
    forward = 2 * (2 * 10 * 12) * (8 // 4 * 3)
    assert counter.get_total_flops() == 3 * forward


def test_flops_of_attention_are_counted_on_the_processor(pretrain_step):
    states = torch.ones(1, 2, 7, 4, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=pretrain_step.FLOP_FORMULAS) as counter:
        nn.functional.scaled_dot_product_attention(states, states, states)
    assert counter.get_total_flops() == 2 * (2 * 2 * 7 * 7 * 4)


def test_peer_has_the_size_and_the_dropout_of_our_encoder(pretrain_step):
    config = SpeechCLConfig(**{**TINY, "hidden_dropout": 0.2}, objectives={"best_rq": {"weight": 1.0}})
    job = pretrain_step.Job(pretrain_step.PEER, "float32", config, "tiny", 2, 0.5)
    clips = list(np.random.default_rng(0).standard_normal((2, 8000), dtype=np.float32))
    peer, batch, _ = pretrain_step.build_peer(job, clips, pretrain_step.Arguments())
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_dropout")
    assert {name: getattr(peer.config, name) for name in same} == {name: getattr(config, name) for name in same}
    assert batch["mask_time_indices"].shape == batch["sampled_negative_indices"].shape[:2]


def test_benchmark_of_the_data_path_prints_its_tables():
    output = run_script(
        "benchmarks/data_path.py", "--encoder_options", *TINY_OPTIONS, "--threads", 1, "--updates", 3, "--rounds", 1,
        "--max_seconds_per_batch", 8, "--decoded_seconds", 5, "--command", "False",
    ).stdout  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    shares = {row[0]: float(row[3].split()[0]) for row in rows if len(row) == 4 and row[1][:1].isdigit()}
    assert shares.pop("bare loop, batches in memory") == 1
    assert len(shares) == 7
    assert all(share > 0 for share in shares.values())
    assert {"decoding, with the rows", "the corpus"} <= {row[0] for row in rows}
    assert "float32, cpu, 8 s a batch" in output.splitlines()[0]


def test_benchmark_of_transcription_measures_every_model_in_every_way_and_refuses_what_it_does_not_know(capsys):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmarks" / "transcribe.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = ["--sizes", "tiny", "--seconds", "1", "--batch_sizes", "2", "--rounds", "1", "--frame_rates", "25"]
    options += ["--dtypes", "int8", "--peer_dtypes", "float32", "--threads", "1"]
    benchmark.main(options)
    first, _, *table = capsys.readouterr().out.splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\d, .*, 1 threads of \d+ cores, Python \S+, torch \S+, transformers \S+; no dropout", first
    )
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [(row[1], row[3], row[5]) for row in rows] == [
        (way, *model)
        for way in ("model", "recognizer", "pipeline")
        for model in (("Wav2Vec2ForCTC, 50 Hz", "float32"), ("SpeechCLForCTC, 25 Hz", "int8"))
    ]
    for row in rows:
        entry = dict(zip(header, row, strict=True))
        assert entry["front end"] in ("7 convolutions", "log-mel")
        peak, call = map(int, re.match(r"(\d+) \((\d+)\)", entry["peak MiB (of the call)"]).groups())
        assert 0 <= call < peak
    assert [row[-2] for row in rows[::2]] == ["1.0"] * 3
    with pytest.raises(ValueError, match="ways must be of model, recognizer, pipeline, found telepathy"):
        benchmark.Arguments(ways=["telepathy"])
