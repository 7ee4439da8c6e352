"""The collapse guard: its measures, its verdicts, and runs that are made to collapse."""

import json
import logging
import math

import pytest
import torch

from hf_speechcl import SpeechCLConfig, SpeechCLForPreTraining
from hf_speechcl.training.guard import CollapseError, CollapseGuard, effective_rank, embedding_std
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import TINY


def test_embedding_std_is_one_for_directions_everywhere_and_zero_for_one():
    everywhere = torch.randn(4000, 16)
    assert embedding_std(everywhere) == pytest.approx(1, abs=0.02)
    assert embedding_std(everywhere * 1000) == pytest.approx(embedding_std(everywhere), rel=1e-5)
    assert embedding_std(torch.ones(50, 16)) == pytest.approx(0, abs=1e-6)
    assert embedding_std(100 + everywhere) < 0.02


def test_effective_rank_counts_directions():
    assert effective_rank(torch.randn(20000, 8)) == pytest.approx(8, rel=0.01)
    plane = torch.randn(20000, 2) @ torch.linalg.qr(torch.randn(8, 2)).Q.T
    assert effective_rank(plane) == pytest.approx(2, rel=0.01)
    assert effective_rank(torch.randn(500, 1) * torch.ones(8)) == pytest.approx(1, rel=1e-5)
    assert math.isnan(effective_rank(torch.full((5, 8), float("nan"))))


def make_guard(stop_after=0, learning_rate=5e-4, **objectives):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives or {"best_rq": {}}))
    return CollapseGuard(model, learning_rate, stop_after)


HEALTHY = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("vectors", "scalars", "verdict", "reason"),
    [
        (HEALTHY, {}, 0, "encoder: embedding std 0.99"),
        (20 + HEALTHY, {}, 1, "embedding std 0.05"),
        (100 + HEALTHY, {}, 2, "embedding std 0.01"),
        (HEALTHY[:, :1] * torch.ones(16), {}, 2, "effective rank 1.0"),
        (torch.full((9, 16), float("nan")), {}, 2, "embedding std nan"),
        (HEALTHY, {"wav2vec2/code_perplexity": 40.0, "wav2vec2/codes_used": 90.0}, 0, "perplexity 40.0"),
        (HEALTHY, {"wav2vec2/code_perplexity": 3.0, "wav2vec2/codes_used": 8.0}, 1, "8 codes in use, perplexity 3.0"),
        (HEALTHY, {"wav2vec2/code_perplexity": 1.0, "wav2vec2/codes_used": 1.0}, 2, "1 codes in use, perplexity 1.0"),
        (HEALTHY, {"wav2vec2/accuracy": 0.3, "wav2vec2/chance": 0.01}, 0, "accuracy 0.300 against 0.010"),
        (HEALTHY, {"wav2vec2/accuracy": 0.01, "wav2vec2/chance": 0.01}, 1, "accuracy 0.010 against 0.010 by chance"),
        (HEALTHY, {"wav2vec2/accuracy": 1.0, "wav2vec2/chance": 1.0}, 2, "accuracy 1.000 against 1.000 by chance"),
    ],
)
def test_verdicts(vectors, scalars, verdict, reason, caplog):
    caplog.set_level(logging.INFO)
    guard = make_guard(wav2vec2={})
    guard.observe("encoder", vectors)
    report = guard.judge(scalars, update=7)
    assert report["guard/verdict"] == verdict
    assert f"update 7: {['healthy', 'suspicious', 'collapsed'][verdict]}" in caplog.text
    assert reason in caplog.text
    assert ("Remedy: lower learning_rate" in caplog.text) == (verdict > 0)


def test_embeddings_must_be_spread_more_than_frames():
    for stage, verdict in (("encoder", 1), ("info_nce_embeddings", 2)):
        guard = make_guard(info_nce={})
        guard.observe(stage, 20 + HEALTHY)
        assert guard.judge({}, update=1)["guard/verdict"] == verdict


def test_likely_causes_are_options_far_from_their_defaults(caplog):
    guard = make_guard(learning_rate=5e-2, info_nce={"temperature": 30.0}, siamese={"stop_gradient": False})
    guard.observe("info_nce_embeddings", torch.ones(9, 16))
    guard.judge({}, update=1)
    assert "Likely cause: learning_rate is 0.05, where 0.0005 is usual; info_nce.temperature is 30.0" in caplog.text
    assert "stop_gradient" not in caplog.text.replace("siamese.stop_gradient on", "")
    guard.watching().__enter__()
    guard.observe("siamese_embeddings", torch.ones(9, 16))
    guard.judge({}, update=2)
    assert "siamese.stop_gradient is False, where True is usual" in caplog.text


def test_run_is_stopped_after_as_many_collapses_in_a_row_as_asked():
    guard = make_guard(stop_after=2)
    for update, vectors in enumerate((torch.ones(9, 16), HEALTHY, torch.ones(9, 16))):
        guard.vectors = {}
        guard.observe("encoder", vectors)
        guard.judge({}, update)
    guard.judge({}, update)  # the same update once more
    with pytest.raises(CollapseError, match="stopped at update 5, as stop_on_collapse asks: encoder: embedding std"):
        guard.judge({}, update=5)


def test_guard_looks_at_the_frames_of_clips_and_not_at_padding(clips):
    guard = make_guard()
    encoder = guard.model.speechcl.eval()
    samples = torch.zeros(2, 16000)
    samples[0], samples[1, :4000] = torch.randn(16000), torch.randn(4000)
    with guard.watching():
        encoder(samples, attention_mask=(torch.arange(16000) < torch.tensor([[16000], [4000]])).long())
        states = encoder(samples[:1]).last_hidden_state
    assert [len(part) for part in guard.vectors["encoder"]] == [25 + 7, 25]
    torch.testing.assert_close(guard.vectors["encoder"][1], states[0].detach())
    encoder(samples)
    assert len(guard.vectors["encoder"]) == 2


RUN = (
    "--encoder_options hidden_size=128 num_hidden_layers=4 num_attention_heads=4 intermediate_size=512 "
    "--use_cpu --disable_tqdm True --report_to none --max_seconds_per_batch 12 --max_steps 75 --eval_steps 75 "
    "--save_strategy no --logging_steps 75"
).split()


@pytest.mark.parametrize(
    ("options", "verdicts", "reason"),
    [
        ("best_rq --learning_rate 5e-2", [2], "learning_rate is 0.05, where 0.0005 is usual"),
        (
            "info_nce --objective_options info_nce.temperature=10000 info_nce.batch_norm=false",
            [1, 2],
            "info_nce.temperature is 10000, where 0.1 is usual",
        ),
        (
            "siamese --objective_options siamese.form=simsiam siamese.stop_gradient=false siamese.batch_norm=false",
            [2],
            "siamese.stop_gradient is False, where True is usual",
        ),
        ("siamese --objective_options siamese.form=simsiam", [0], "update 75: healthy"),
        ("best_rq", [0], "update 75: healthy"),
    ],
    ids=[
        "rate x 100",
        "absurd temperature",
        "no stop-gradient, no batch norm",
        "SimSiam as it should be",
        "BEST-RQ as it should be",
    ],
)
def test_runs_made_to_collapse_are_found_out_and_healthy_ones_are_not(options, verdicts, reason, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pretrain([*RUN, "--output_dir", str(tmp_path), "--objectives", *options.split()])
    assert reason in caplog.text
    assert json.loads((tmp_path / "results.json").read_text())["eval_guard/verdict"] in verdicts
