"""The comparison of objectives: its processes, and whole chains of them on a corpus made of the embedded clips."""

import itertools
import json
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_speechcl.evaluation.evaluate import main as evaluate
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.make_pseudo_labels import main as make_pseudo_labels
from hf_speechcl.training.make_units import main as make_units
from hf_speechcl.training.pretrain import main as pretrain
from tests.comparison import MINUTES, YAML, small_config

# Processes


def test_a_process_is_measured_and_its_end_is_shown_when_it_fails(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.processes, "SCRIPTS", tmp_path)
    (tmp_path / "busy.py").write_text(
        "import os, time\nwhile time.process_time() < 0.3: pass\nprint(os.environ['OMP_NUM_THREADS'])"
    )
    (tmp_path / "fails.py").write_text("print('why')\nraise SystemExit(3)")
    processes, only_one = scripts.processes.Processes(threads=1), scripts.processes.only_one
    with only_one(tmp_path / "run/lock") as lock:
        took = processes.run("busy.py", [], tmp_path / "busy.log", lock)
        with pytest.raises(scripts.processes.RunError, match="fails.py ended with 3(?s:.*)why"):
            processes.run("fails.py", [], tmp_path / "fails.log", lock)
        with (
            pytest.raises(scripts.processes.RunError, match="another process"),
            scripts.processes.only_one(tmp_path / "run/lock"),
        ):
            pass
    assert 0.3 <= took["cpu_seconds"] < 10
    assert took["wall_seconds"] >= 0.3
    assert (tmp_path / "busy.log").read_text() == "1\n"


def test_seconds_of_a_resumed_run_are_in_proportion_to_its_updates(scripts, tmp_path):
    checkpoint = tmp_path / "stage1/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    truncated = tmp_path / "stage1/checkpoint-6"  # as the run was killed while it wrote it
    truncated.mkdir()
    (truncated / "trainer_state.json").write_text('{"global_st')
    log = [{"step": step, "loss": 11.0 - step, "audio_hours": step / 10} for step in range(1, 11)]

    class Resumed:
        def run(self, script, argv, log_file, keep_open):
            model = {"weight": torch.zeros(3, 4), "bias": torch.zeros(5)}
            save_file(model, tmp_path / "stage1/model.safetensors")
            (tmp_path / "stage1/trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": log}))
            return {"wall_seconds": 14.0, "cpu_seconds": 7.0}

    took = scripts.processes.train(Resumed(), "pretrain.py", tmp_path / "stage1", [], 5, 0)
    assert took == {
        "wall_seconds": pytest.approx(20),
        "cpu_seconds": pytest.approx(10),
        "updates": 10,
        "audio_hours": 1.0,
        "loss_before": 3.5,
        "loss_last": 1.5,
        "parameters": 17,
        "resumed": True,
    }
    assert not checkpoint.exists()
    assert scripts.processes.train(None, "pretrain.py", tmp_path / "stage1", [], 5, 0) == took


def test_a_run_killed_after_its_last_update_is_made_anew(scripts, tmp_path, caplog):
    folder = tmp_path / "stage1"

    class Resumed:
        found = []

        def run(self, script, argv, log_file, keep_open):
            self.found.append(folder.is_dir())
            folder.mkdir(exist_ok=True)
            save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": []}))
            return {"wall_seconds": 14.0, "cpu_seconds": 7.0}

    folder.mkdir()  # of a run killed between its end and its note
    (folder / "model.safetensors").write_bytes(b"")
    scripts.processes.train(Resumed(), "pretrain.py", folder, [], 5, 0)
    assert Resumed.found.pop() is False
    scripts.processes.beside(folder, ".json").unlink()
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-10/trainer_state.json").write_text('{"global_step": 10}')
    took = scripts.processes.train(Resumed(), "pretrain.py", folder, [], 5, 0)
    assert Resumed.found == [True, False]
    assert (took["cpu_seconds"], took["resumed"]) == (7.0, False)
    assert "killed after its last update" in caplog.text


# Whole chains


class FakeProcesses(dict):
    """Runs scripts in this process; those named in `failing` end with an error."""

    def __init__(self, scripts, failing=()):
        self.scripts, self.failing, self.calls = scripts, failing, []

    def __missing__(self, tier):
        return self

    def stop(self):
        pass

    def run(self, script, argv, log, keep_open):
        self.calls.append((script, argv))
        if script in self.failing:
            raise self.scripts.processes.RunError(f"{script} ended with 1")
        mains = {"pretrain.py": pretrain, "finetune_ctc.py": finetune_ctc, "evaluate.py": evaluate}
        mains |= {"make_units.py": make_units, "make_pseudo_labels.py": make_pseudo_labels}
        mains["benchmarks/peer.py"] = self.scripts.peer.main
        mains["benchmarks/few_shot.py"] = self.scripts.few_shot.main
        if "--seconds" in argv:
            argv = [*argv]
            argv[argv.index("--seconds") + 1] = "0.1"
        mains[script](argv)
        seconds = 1.0 if script.startswith("make_") else 10.0
        if script == "pretrain.py":
            own = options_of(argv)
            seconds = 2.0 + int(own["max_steps"]) * (1.5 if "denoising" in own["output_dir"].split("/")[-3:] else 4.0)
        return {"wall_seconds": 20.0, "cpu_seconds": seconds}


def options_of(argv):
    """The first value of every option of a command line."""
    return {name[2:]: value for name, value in zip(argv, argv[1:]) if name.startswith("--")}


@pytest.fixture
def compare(scripts, small_data, tmp_path, monkeypatch):
    """Runs the front door with tiny models; the processes, and what it returned."""
    config, file = small_config(scripts, tmp_path)
    monkeypatch.setattr("hf_speechcl.training.trainer.plot_curves", lambda *args: None)  # dozens of runs, a second each

    def run(*options, failing=()):
        processes = FakeProcesses(scripts, failing)
        original = scripts.chains.Comparison.__init__

        def start(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.processes = processes

        with monkeypatch.context() as patched:
            patched.setattr(scripts.chains.Comparison, "__init__", start)
            argv = ["--config", str(file), "--data", str(small_data), "--output_dir", str(tmp_path / "out"), *options]
            return processes, scripts.objectives.main(argv)

    run.rows = lambda: scripts.processes.Results(tmp_path / "out/results.parquet").rows()
    run.folder = tmp_path / "out"
    return run


def test_an_arm_hears_only_audio_like_that_of_the_labels(compare, scripts, small_data):
    processes, code = compare("--tiers", "T2", "--arms", "hubert+best_rq_near", "--labels", MINUTES)
    assert code == 0
    near = scripts.tiers.TierData("T2", small_data, compare.folder / "data").near
    for script, argv in processes.calls[:2]:
        heard = itertools.takewhile(lambda value: not value.startswith("--"), argv[argv.index("--corpus") + 1 :])
        assert list(heard) == near, script
    assert [script for script, _ in processes.calls[:2]] == ["make_units.py", "pretrain.py"]


def test_chains_end_in_rows_and_a_report_and_are_not_run_again(compare, capsys):
    arms = [
        "--arms",
        "scratch",
        "frozen_random",
        "log_mel",
        "best_rq",
        "hubert+best_rq",
        "hubert_2",
        "hubert+best_rq_self_trained",
        "scratch_self_trained",
        "scratch_whole",
        "scratch_whole_self_trained",
        "transformers_wav2vec2",
        "best_rq_in_halves",
    ]
    options = [*arms, "--phase", "dev", "--labels", "all"]
    processes, code = compare(*options)
    assert code == 0
    rows = {row["arm"]: row for row in compare.rows()}
    assert set(rows) == set(arms[1:])
    row = rows["best_rq"]
    assert row["cer"] == pytest.approx(sum(row["cer_edits"]) / sum(row["cer_lengths"]))
    assert len(row["clips"]) == len(row["cer_edits"]) == 40
    assert row["validation_cer"] == pytest.approx(row["cer"], abs=0.1)  # of clips whose phones train has
    assert (row["updates"], row["finetuning_updates"]) == (2, 5)
    assert 0.3 < row["few_shot"] <= 1  # of two speakers
    assert rows["scratch"]["few_shot"] is None
    assert (row["pretraining_cpu_seconds"], row["pretraining_wall_seconds"]) == (10, 20)
    assert rows["hubert_2"]["pretraining_cpu_seconds"] == 2 * (6 + 1)
    assert rows["hubert_2"]["updates"] == 2
    # The encoder of the other arm, a teacher, and twice texts and a student; from scratch all but the encoder.
    assert rows["hubert+best_rq_self_trained"]["pretraining_cpu_seconds"] == (10 + 1) + 10 + 2 * (1 + 10)
    assert rows["scratch_self_trained"]["pretraining_cpu_seconds"] == 10 + 2 * (1 + 10)
    assert rows["hubert+best_rq_self_trained"]["updates"] == 2 + 5 + 2 * 4
    assert rows["hubert+best_rq_self_trained"]["finetuning_updates"] == 3
    assert rows["scratch_self_trained"]["few_shot"] is None
    encoder = str(next(compare.folder.glob("runs/T1/hubert+best_rq/*/stage1")))
    steps = [
        options_of(argv)
        for script, argv in processes.calls
        if script == "finetune_ctc.py" and "/hubert+best_rq" in options_of(argv)["output_dir"]
    ]
    made = [own["output_dir"] for own in steps]
    assert ["_self_trained/" in folder for folder in made] == [False, True, True, True]
    assert [own["model"] for own in steps] == [encoder, encoder, made[1], made[2]]
    assert [own["max_steps"] for own in steps] == ["5", "4", "4", "3"]
    calls = [options_of(argv) for script, argv in processes.calls if script == "make_pseudo_labels.py"]
    written = [own for own in calls if "/hubert+best_rq_self_trained/" in own["output_dir"]]
    assert [own["model"] for own in written] == [made[0], made[1]]
    texts = [own["output_dir"] for own in written]
    assert [own.get("pseudo_labels") for own in steps] == [None, *texts, None]
    assert rows["best_rq_in_halves"]["pretraining_cpu_seconds"] == 2 * 6
    (goes_on,) = [argv for script, argv in processes.calls if script == "pretrain.py" and argv[1].endswith("stage1")]
    assert "--encoder_options" not in goes_on
    assert rows["scratch"]["updates"] == 0
    assert rows["scratch_whole"]["finetuning_updates"] == 5 + round(5 * (10 + 1) / 10)
    budget = rows["hubert+best_rq_self_trained"]["pretraining_cpu_seconds"]
    assert rows["scratch_whole_self_trained"]["finetuning_updates"] == 5 + round(3 * budget / 10)
    assert rows["transformers_wav2vec2"]["updates"] >= 1
    (peer,) = [argv for script, argv in processes.calls if script == "benchmarks/peer.py" and argv[0] == "pretrain"]
    assert float(options_of(peer)["seconds"]) == 10 + 1  # of the reference arm, with its units
    assert rows["log_mel"]["parameters"] < rows["scratch"]["parameters"]
    assert not list(compare.folder.glob("runs/**/checkpoint-*"))
    kept = [file.relative_to(compare.folder / "runs/T1") for file in compare.folder.glob("runs/**/model.safetensors")]
    assert {file.parts[0] for file in kept if not file.parts[2].startswith("stage")} == {"hubert+best_rq", "scratch"}
    report = (compare.folder / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "| best_rq | " in report
    assert "| scratch_self_trained ‡ | " in report
    for kind in ("labels", "hours", "compute"):
        assert (compare.folder / f"T1_dev_updates_cer_{kind}.png").read_bytes().startswith(b"\x89PNG")
    processes, code = compare(*options)
    assert (processes.calls, code) == ([], 0)


def test_a_teacher_is_the_model_of_its_arm_and_trained_anew_if_that_was_deleted(compare):
    options = ["--phase", "dev", "--labels", MINUTES]
    assert compare("--arms", "scratch_self_trained", *options)[1] == 0
    processes, code = compare("--arms", "scratch", *options)
    assert code == 0
    assert [script for script, _ in processes.calls] == ["evaluate.py"]
    (teacher,) = compare.folder.glob("runs/T1/scratch/*/dev*/model.safetensors")
    weights = teacher.read_bytes()
    teacher.unlink()
    for folder in compare.folder.glob("runs/T1/scratch_self_trained/*"):
        shutil.rmtree(folder)
    (compare.folder / "results.parquet").unlink()
    processes, code = compare("--arms", "scratch_self_trained", *options)
    assert code == 0
    assert [script for script, _ in processes.calls].count("finetune_ctc.py") == 1 + 2 + 1
    assert teacher.read_bytes() == weights


def test_scratch_has_the_encoder_that_others_pretrain(compare):
    processes, _ = compare("--arms", "scratch", "best_rq", "--labels", MINUTES)
    by_arm = {row["arm"]: row for row in compare.rows()}
    assert by_arm["scratch"]["parameters"] == by_arm["best_rq"]["parameters"]
    assert by_arm["scratch"]["validation_cer"] is None
    assert len(by_arm["scratch"]["clips"]) == 4


def test_a_failing_run_is_counted_and_the_others_go_on(compare, caplog):
    _, code = compare("--arms", "best_rq", "scratch", "--labels", MINUTES, failing=["pretrain.py"])
    assert code == 1
    assert [row["arm"] for row in compare.rows()] == ["scratch"]
    assert f"failed: best_rq seed 0, labels {MINUTES}. pretrain.py ended with 1" in caplog.text
    processes, code = compare("--arms", "best_rq", "scratch", "--labels", MINUTES)
    assert code == 0
    scripts = [script for script, _ in processes.calls]
    assert scripts == ["pretrain.py", "finetune_ctc.py", "evaluate.py", "benchmarks/few_shot.py"]


class FakeComparison:
    """Says what is run at once; encoders of seed `fails` are not made, nor is the label size "60" of any."""

    def __init__(self, fails):
        self.fails, self.made, self.finished, self.together, self.running = fails, [], [], 0, 0
        self.lock = threading.Lock()

    def encoder_folder(self, chain):
        return chain.folder.with_name(f"encoder{chain.seed}")

    def make_encoder(self, chain):
        self.made.append(chain.seed)
        if chain.seed == self.fails:
            raise RuntimeError("no encoder")
        return f"encoder{chain.seed}", {"updates": 7}

    def finish(self, chain, size, encoder, took):
        with self.lock:
            self.running += 1
            self.together = max(self.together, self.running)
        time.sleep(0.05)
        with self.lock:
            self.running -= 1
        if size == "60":
            raise RuntimeError("no row")
        self.finished.append((chain.recipe.arm, chain.seed, size, encoder, took["updates"]))


def test_label_sizes_of_all_arms_with_an_encoder_are_run_side_by_side(scripts, tmp_path, caplog):
    config = scripts.recipes.read_config(YAML)
    arms = ("hubert+best_rq", "hubert+best_rq_self_trained", "scratch")
    chains = [
        scripts.chains.Chain(
            scripts.recipes.build_recipe(config, "T3", arm, ["10", "60"]),
            seed,
            "updates",
            "dev",
            tmp_path,
            ["10", "60"],
        )
        for seed in (0, 1)
        for arm in arms
    ]
    comparison = FakeComparison(fails=1)
    assert scripts.objectives.run_all(comparison, chains, 3) == 3 + 3 * 2
    assert sorted(comparison.made) == [0, 1]
    assert sorted(comparison.finished) == [(arm, 0, "10", "encoder0", 7) for arm in sorted(arms)]
    assert comparison.together == 3
    assert "failed: scratch seed 1, labels 10, 60. no encoder" in caplog.text
    assert "failed: scratch seed 0, labels 60. no row" in caplog.text


def test_equal_time_is_measured_by_short_runs_in_turns(compare):
    processes, code = compare("--arms", "denoising", "--labels", MINUTES, "--table", "time")
    assert code == 0
    trained = [options_of(argv) for script, argv in processes.calls if script == "pretrain.py"]
    assert [own["max_steps"] for own in trained] == ["1", "1", "3", "3", str(round(2 * 4 / 1.5))]
    arms = [own["output_dir"].split("/")[-2] for own in trained[:4]]
    assert arms == 2 * ["hubert+best_rq", "denoising"]
    assert [script for script, _ in processes.calls].count("make_units.py") == 1
    assert not list(compare.folder.glob("runs/**/timing"))
    (row,) = compare.rows()
    assert (row["table"], row["updates"], row["pretraining_cpu_seconds"]) == ("time", 5, 2 + 5 * 1.5)


def test_time_of_another_device_is_no_measure(compare, scripts, caplog):
    options = ["--arms", "scratch_whole", "--labels", MINUTES]
    assert compare(*options)[1] == 1
    assert compare("--arms", "hubert+best_rq", "--labels", MINUTES)[1] == 0
    caplog.clear()
    results = scripts.processes.Results(compare.folder / "results.parquet")
    rows = results.rows()
    for row in rows:
        assert row["device"] == "cpu"
        results.add(row | {"device": "cuda"})
    assert compare(*options)[1] == 1
    assert "run --arms hubert+best_rq --table updates first" in caplog.text
    for row in rows:
        results.add(row | {"machine": "2026-11-27, a slower one"})
    assert compare(*options)[1] == 0
    assert "hubert+best_rq: its length is measured in time of another machine: a slower one" in caplog.text


def test_dry_run_prints_the_plan_and_runs_nothing(compare, capsys):
    processes, code = compare("--arms", "best_rq", "scratch_whole", "--dry_run", "True")
    printed = capsys.readouterr().out
    assert (processes.calls, code) == ([], 0)
    assert f"| T1 | best_rq | 0 | 2 | {MINUTES}: 5, all: 5 | 0 |" in printed
    assert "by rows to come" in printed
    assert "4 runs to be made" in printed
