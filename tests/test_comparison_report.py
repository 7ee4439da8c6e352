"""Tables of the comparison, made of rows alone."""

import datetime
import json

import numpy as np
import pytest

from tests.comparison import YAML


def make_row(arm, seed, labels, edits, lengths, **changes):
    return {
        "run": f"{arm}/{seed}/{labels}", "recipe": "a", "tier": "T1", "phase": "final", "table": "updates", "arm": arm,
        "seed": seed, "labels": labels, "label_minutes": 30.0 if labels == "all" else float(labels),
        "cer": sum(edits) / sum(lengths), "clips": [str(number) for number in range(len(edits))], "cer_edits": edits,
        "cer_lengths": lengths, "loss_before": 1.0, "loss_last": 0.99, "updates": 2, "audio_hours": 1.5,
        "pretraining_cpu_seconds": 120.0, "pretraining_wall_seconds": 60.0, "parameters": 5_000_000, "commit": "abc",
        "machine": "2026-11-26, a machine", "options": "{}", "finished": datetime.datetime(2026, 11, 26),
    } | changes  # fmt: skip


def make_cell(scripts, arm, *edits, lengths=(10, 10)):
    rows = [make_row(arm, seed, "3", list(own), list(lengths)) for seed, own in enumerate(edits)]
    return scripts.comparison_report.Cell(rows, "cer")


def test_reduction_is_of_the_mean_over_seeds_with_the_same_clips_resampled(scripts):
    reduction = scripts.comparison_report.relative_reduction
    half = reduction(make_cell(scripts, "a", [1, 3]), make_cell(scripts, "scratch", [2, 6]))
    assert half == {"reduction": 0.5, "low": 0.5, "high": 0.5, "seeds": 1}
    # The first clip without errors, the second as before: resamples are both of the first, both of the second or mixed.
    found = reduction(make_cell(scripts, "a", [0, 4]), make_cell(scripts, "scratch", [4, 4]))
    assert found == {"reduction": 0.5, "low": 0.0, "high": 1.0, "seeds": 1}
    two = reduction(make_cell(scripts, "a", [1, 1], [3, 3]), make_cell(scripts, "scratch", [4, 4], [4, 4], [9, 9]))
    assert two == {"reduction": 0.5, "low": 0.5, "high": 0.5, "seeds": 2}


def test_only_seeds_of_both_arms_are_compared(scripts):
    mine, baseline = make_cell(scripts, "a", [1, 1]), make_cell(scripts, "scratch", [2, 2])
    baseline.rows[0]["seed"] = 5
    assert scripts.comparison_report.relative_reduction(mine, baseline) is None
    baseline.rows[0] |= {"seed": 0, "clips": ["0", "other"]}
    with pytest.raises(ValueError, match="scored on different clips"):
        scripts.comparison_report.relative_reduction(mine, baseline)


def test_labels_that_scratch_needs_lie_between_its_points_over_the_logarithm(scripts):
    needed = scripts.comparison_report.minutes_needed
    curve = [(30.0, 0.2), (3.0, 0.6)]
    assert needed(curve, 0.4) == ("=", pytest.approx(np.sqrt(90)))
    assert needed(curve, 0.1) == (">", 30.0)
    assert needed(curve, 0.7) == ("<", 3.0)


def test_fine_tuning_has_converged_when_its_loss_hardly_falls(scripts):
    converged = scripts.comparison_report.has_converged
    assert converged(1.0, 0.95)
    assert not converged(1.0, 0.8)
    assert converged(0.04, 0.01)
    assert not converged(None, None)


def test_report_says_mean_spread_reduction_and_what_does_not_count(scripts, tmp_path):
    config = scripts.recipes.read_config(YAML)
    rows = [
        make_row("scratch", 0, "3", [4, 4], [10, 10], updates=0, audio_hours=0.0, pretraining_cpu_seconds=0.0),
        make_row("scratch", 1, "3", [6, 6], [10, 10], updates=0, audio_hours=0.0, pretraining_cpu_seconds=0.0),
        make_row("scratch", 0, "all", [1, 1], [10, 10], updates=0, audio_hours=0.0, pretraining_cpu_seconds=0.0),
        make_row("best_rq", 0, "3", [9, 9], [10, 10], recipe="old"),
        make_row("best_rq", 0, "3", [2, 2], [10, 10]),
        make_row("best_rq", 1, "3", [3, 3], [10, 10]),
        make_row("best_rq", 0, "all", [1, 1], [10, 10], audio_hours=9.0, updates=9, commit="def"),
        make_row("wav2vec2", 0, "3", [4, 4], [10, 10], loss_last=0.5),
    ]
    text = scripts.comparison_report.write_report(rows, config, tmp_path)
    assert "| arm | 3 min | all (30 min) |" in text
    assert "| scratch | 50.0% ± 14.1 (n=2) | 10.0% (n=1) |" in text
    assert "| best_rq | 25.0% ± 7.1 (n=2); −50% [−50, −50] | 10.0% (n=1); +0% [+0, +0] |" in text
    assert "| wav2vec2 | 40.0% (n=1) †; +0% [+0, +0] |  |" in text
    assert (
        "| best_rq | 3.0 min | 13.9 min | 4.6× |" in text
    )  # of seed 0, 2/3 of the way from 3 to 30 over the logarithm
    assert "| wav2vec2 | 3.0 min | < 3.0 min | < 1.0× |" in text  # of seed 0, as its own
    assert "| best_rq | 1.50 | 2 | 2.0 | 1.0 | 5.00 M |  |  |  |" in text
    assert "Run on a machine. Commits abc, def." in text


def test_changes_say_when_their_baseline_or_their_seeds_are_fewer(scripts, tmp_path):
    config, falls = scripts.recipes.read_config(YAML), {"loss_last": 0.5}
    rows = [
        make_row("scratch", 0, "3", [4, 4], [10, 10], **falls),
        make_row("scratch", 0, "all", [1, 1], [10, 10]),
        make_row("scratch_whole", 0, "3", [5, 5], [10, 10]),
        make_row("best_rq", 0, "3", [2, 2], [10, 10]),
        make_row("best_rq", 1, "3", [2, 2], [10, 10]),
        make_row("hubert+best_rq_fourfold", 0, "3", [2, 2], [10, 10]),
        make_row("hubert+best_rq_self_trained", 0, "3", [2, 2], [10, 10]),
        make_row("scratch_whole_self_trained", 0, "3", [8, 8], [10, 10]),
        make_row("transformers_wav2vec2", 0, "3", [5, 5], [10, 10]),
    ]
    report = scripts.comparison_report.write_report(rows, config, tmp_path)
    change = "−50% [−50, −50] (n=1) †; whole −60% [−60, −60] (n=1)"
    assert f"| best_rq | 20.0% ± 0.0 (n=2); {change} |" in report
    assert "| scratch_whole ‡ | 50.0% (n=1) |" in report
    assert "| hubert+best_rq_fourfold ‡ | 20.0% (n=1); −50% [−50, −50] † |" in report
    change = "−50% [−50, −50] †; whole −75% [−75, −75]"
    assert f"| hubert+best_rq_self_trained ‡ | 20.0% (n=1); {change} |" in report
    assert "| scratch_whole_self_trained ‡ | 80.0% (n=1) |" in report
    assert "| transformers_wav2vec2 ‡ | 50.0% (n=1); +25% [+25, +25] †; whole +0% [+0, +0] |" in report
    assert "| arm | its labels | scratch † needs | times |" in report


def test_convergence_is_not_asked_of_a_short_last_training(scripts, tmp_path):
    config, falls = scripts.recipes.read_config(YAML), {"loss_last": 0.5}
    trained = json.dumps({"self_training": {"rounds": 2}})
    rows = [
        make_row("best_rq", 0, "3", [1, 1], [10, 10], **falls),
        make_row("scratch_self_trained", 0, "3", [1, 1], [10, 10], **falls, options=trained),
    ]
    report = scripts.comparison_report.write_report(rows, config, tmp_path)
    assert "| best_rq | 10.0% (n=1) † |" in report
    assert "| scratch_self_trained ‡ | 10.0% (n=1) |" in report


def test_columns_whose_best_arm_is_useless_do_not_count(scripts, tmp_path, caplog):
    config = scripts.recipes.read_config(YAML)
    elsewhere = {**make_row("best_rq", 0, "3", [1, 1], [10, 10]), "tier": "T9"}
    assert "T9" not in scripts.comparison_report.write_report([elsewhere], config, tmp_path)
    assert "not in the report: rows of T9" in caplog.text
    rows = [make_row("best_rq", 0, "3", [6, 6], [10, 10])]
    assert "| best_rq | 60.0% (n=1) † |" in scripts.comparison_report.write_report(rows, config, tmp_path)
