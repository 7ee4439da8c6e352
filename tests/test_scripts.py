"""The scripts as a user runs them: the whole road, configurations, wrong options and bad files."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCTC, pipeline

from hf_speechcl import SpeechCLConfig, SpeechCLForPreTraining, SpeechDataset
from hf_speechcl.command_line import parse_arguments, parse_assignments
from hf_speechcl.evaluation import evaluate
from hf_speechcl.training import finetune_classifier, finetune_ctc, make_pseudo_labels, make_units, pretrain
from hf_speechcl.training.arguments import (
    PretrainingDataArguments,
    PretrainingModelArguments,
    SpeechTrainingArguments,
    parse_objectives,
)
from hf_speechcl.training.pretrain import build_collator, build_model, check_options
from tests.conftest import FAST_RUN, ROOT, TINY, TINY_OPTIONS, run_script

SCRIPTS = {
    "pretrain.py": pretrain,
    "make_units.py": make_units,
    "finetune_ctc.py": finetune_ctc,
    "make_pseudo_labels.py": make_pseudo_labels,
    "finetune_classifier.py": finetune_classifier,
    "evaluate.py": evaluate,
}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A folder with an encoder and a recogniser trained for a few updates, and its scores."""
    folder = tmp_path_factory.mktemp("road")
    pretrained = run_script(
        "pretrain.py", "--output_dir", folder / "encoder", "--max_steps", 3, "--encoder_options", *TINY_OPTIONS,
        "--objectives", "best_rq=1.0", "wav2vec2=0.5", *FAST_RUN, "--report_to", "tensorboard",
        env={"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")},
    )  # fmt: skip
    tuned = run_script(
        "finetune_ctc.py", "--model", folder / "encoder", "--output_dir", folder / "ctc", "--max_steps", 3,
        "--freeze_encoder_steps", 1, *FAST_RUN,
    )  # fmt: skip
    scores = run_script("evaluate.py", "--model", folder / "ctc", "--output_file", folder / "test.json")
    return {"folder": folder, "pretrain": pretrained, "finetune": tuned, "evaluate": scores}


def test_road_leaves_models_cards_curves_and_scores(road):
    for model in ("encoder", "ctc"):
        names = {path.name for path in (road["folder"] / model).iterdir()}
        assert names >= {
            "model.safetensors", "config.json", "configuration_speechcl.py", "modeling_speechcl.py", "README.md",
            "curves.png", "results.json", "trainer_state.json",
        }  # fmt: skip
    scores = json.loads((road["folder"] / "test.json").read_text())
    assert (scores["clips"], scores["split"], scores["text_normalization"]) == (83, "test", "basic")
    assert scores["wer_low"] <= scores["wer"] <= scores["wer_high"]
    assert len(scores["transcripts"]) == 83
    assert re.search(r"WER \d+\.\d% +\(95% interval", road["evaluate"].stdout)


@pytest.mark.parametrize("has_ngram", [False, True])
def test_summary_of_the_quickstart_tells_scores_transcripts_and_what_is_next(road, tmp_path, has_ngram):
    shutil.copytree(road["folder"] / "encoder", tmp_path / "encoder")
    for name in ("recognizer", "scratch"):
        shutil.copytree(road["folder"] / "ctc", tmp_path / name)
        for file in ("test", *(["test-ngram"] if has_ngram else [])):
            shutil.copy(road["folder"] / "test.json", tmp_path / name / f"{file}.json")
    printed = run_script("quickstart_summary.py", tmp_path, "61.2").stdout
    wer = json.loads((road["folder"] / "test.json").read_text())["wer"]
    assert len(re.findall(rf"(?m)^(?:pre-trained|from scratch).* {wer:.1%} \[", printed)) == (4 if has_ngram else 2)
    assert len(re.findall(r"(?m)^    reference   \w+", printed)) == 3
    assert ("with n-gram" in printed) == has_ngram
    assert "Time: 61 s" in printed
    assert (tmp_path / "curves.png").is_file()


def test_road_logs_what_a_run_is_judged_by(road):
    history = json.loads((road["folder"] / "encoder" / "trainer_state.json").read_text())["log_history"]
    keys = set().union(*history)
    assert keys >= {
        "loss", "grad_norm", "learning_rate", "audio_hours", "best_rq/loss", "best_rq/accuracy",
        "best_rq/code_perplexity", "wav2vec2/loss", "wav2vec2/contrastive_loss", "wav2vec2/diversity_loss",
        "wav2vec2/accuracy", "wav2vec2/code_perplexity", "wav2vec2/gumbel_temperature", "eval_best_rq/loss",
    }  # fmt: skip
    temperatures = [line[name] for line in history if (name := "wav2vec2/gumbel_temperature") in line]
    assert temperatures[-1] < temperatures[0]
    tuned = json.loads((road["folder"] / "ctc" / "trainer_state.json").read_text())["log_history"]
    assert set().union(*tuned) >= {"ctc/loss", "eval_wer", "eval_wer_low", "eval_wer_high", "eval_cer", "eval_ctc/loss"}


def test_options_of_the_collators_come_from_the_command_line(tmp_path):
    options = "--objectives best_rq siamese --mask_span 0.08 --mask_prob 0.3 --view_seconds 1.5".split()
    model, data, args = parse_arguments(
        [PretrainingModelArguments, PretrainingDataArguments, SpeechTrainingArguments],
        "",
        ["--use_cpu", "--output_dir", str(tmp_path), *options],
    )
    collator = pretrain.build_trainer(model, data, args).data_collator
    assert (collator.mask_span, collator.mask_prob, collator.max_view_samples) == (2, 0.3, 24000)
    options = "--max_shift 0.01 --mask_time_prob 0.2 --mask_time_span 0.12 --num_feature_masks 3".split()
    (data,) = parse_arguments([finetune_ctc.CTCDataArguments], "", options)
    assert data.regularization(SpeechCLConfig(**TINY)) == {
        "max_shift": 160, "mask_time_prob": 0.2, "mask_time_span": 3, "num_mel_bins": TINY.get("num_mel_bins", 80),
        "num_feature_masks": 3, "mask_feature_span": 20,
    }  # fmt: skip
    (data,) = parse_arguments([finetune_ctc.CTCDataArguments], "", ["--num_feature_masks", "0"])
    assert data.regularization(SpeechCLConfig(**TINY, num_mel_bins=16))["num_feature_masks"] == 0


def test_tensorboard_gets_the_scalars(road):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list((road["folder"] / "tensorboard").rglob("events.*"))
    assert files
    tags = set()
    for file in files:
        events = EventAccumulator(str(file.parent))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert tags >= {"train/best_rq/accuracy", "train/grad_norm", "eval/best_rq/loss"}


def test_cards_are_complete_and_hold_the_numbers_of_the_run(road):
    for model in ("encoder", "ctc"):
        folder = road["folder"] / model
        card = ModelCard.load(folder / "README.md")
        results = json.loads((folder / "results.json").read_text())
        assert f"| eval_loss | {results['eval_loss']:.4g} |" in card.text
        assert str(road["folder"]) not in card.content
        prose = re.sub(r"```.*?```", "", card.content, flags=re.DOTALL)
        assert not re.search(r"\{\{|\}\}|\[More Information|None", prose)
        assert card.data.library_name == "transformers"
    result = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert result["wer"] == pytest.approx(100 * results["eval_wer"], abs=0.01)
    assert "| demo | train | 403 |" in card.text
    assert "add `chunk_length_s=12, stride_length_s=2`" in card.text  # 2 layers of 16 frames of 40 ms


def test_preflight_is_reported_and_written(road):
    report = json.loads((road["folder"] / "ctc" / "preflight_train.json").read_text())
    assert {problem["reason"] for problem in report["problems"]} == {"too long"}
    assert f"{len(report['problems'])} of 406 clips" in road["finetune"].stderr


def test_recognizer_of_the_road_runs_in_the_pipeline(road, clips):
    recognizer = pipeline("automatic-speech-recognition", model=str(road["folder"] / "ctc"))
    assert "text" in recognizer(clips[0], return_timestamps="word")


def test_pretraining_goes_on_from_a_folder_with_other_objectives(road, tmp_path):
    pretrain.main([
        "--encoder", str(road["folder"] / "encoder"), "--objectives", "wav2vec2", "best_rq",
        "--objective_options", "wav2vec2.codebook_size=8", "best_rq.codebook_size=32",
        "--output_dir", str(tmp_path / "more"), "--max_steps", "1", *FAST_RUN,
    ])  # fmt: skip
    assert json.loads((tmp_path / "more" / "config.json").read_text())["objectives"] == {
        "wav2vec2": {"weight": 1.0, "codebook_size": 8},
        "best_rq": {"weight": 1.0, "codebook_size": 32},
    }


def test_fine_tuning_goes_on_from_a_recognizer_with_its_vocabulary(road, tmp_path, audio_folder):
    finetune_ctc.main([
        "--model", str(road["folder"] / "ctc"), "--corpus", str(audio_folder),
        "--output_dir", str(tmp_path / "more"), "--max_steps", "1", *FAST_RUN,
    ])  # fmt: skip
    first, second = ((folder / "vocab.json").read_text() for folder in (road["folder"] / "ctc", tmp_path / "more"))
    assert json.loads(first) == json.loads(second)


def test_bad_clips_in_a_run_are_counted_and_named(audio_folder, clips, tmp_path, caplog):
    soundfile.write(audio_folder / "silent.wav", np.zeros(16000), 16000)
    (audio_folder / "empty.wav").write_bytes(b"")
    (audio_folder / "fake.mp3").write_bytes(b"not music" * 50)
    soundfile.write(audio_folder / "tenth.wav", clips[0][:1600], 16000)
    soundfile.write(audio_folder / "rate.wav", np.stack([clips[1]] * 2, axis=1), 96000, subtype="PCM_24")
    soundfile.write(audio_folder / "eight.wav", clips[2], 16000, subtype="PCM_U8")
    pretrain.main([
        "--corpus", str(audio_folder), "--output_dir", str(tmp_path / "run"), "--max_steps", "6",
        "--encoder_options", *TINY_OPTIONS, *FAST_RUN, "--validation_fraction", "0.01",
    ])  # fmt: skip
    for message in (
        "skipped 2 of 10 files",
        "skipped empty.wav: empty file",
        "skipped fake.mp3: not readable as audio",
        "skipped silent.wav: digital silence",
    ):
        assert message in caplog.text
    assert re.search(r"\d of \d clips are shorter than 0.4 s", caplog.text)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("skipped_clips", 0) for entry in history) > 0
    assert all(np.isfinite(entry["loss"]) for entry in history if "loss" in entry)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain.py", ["--corruptions", "speed=1"], "corruptions must keep every sound in its place"),
        ("pretrain.py", ["--view_augmentations", "echo=1"], "view_augmentations: found 'echo', expected names among"),
        ("pretrain.py", ["--corruptions", "noise=2"], "corruptions: found noise=2, expected a number from 0 to 1"),
        ("pretrain.py", ["--corruptions", "noise=1"], "corruptions are of corrupted input: add --corrupt_input"),
        (
            "pretrain.py",
            ["--objectives", "info_nce", "--corruptions", "noise=1"],
            "compare views, which view_augmentati",
        ),
        (
            "pretrain.py",
            ["--dataloader_in_order", "False"],
            "dataloader_in_order is not used: batches are made of clips",
        ),
        ("pretrain.py", ["--objectives", "info_nce", "--corrupt_input"], "corrupt_input is for objectives on frames"),
        ("pretrain.py", ["--label_column", "speaker"], "label_column='speaker' is for objectives that compare clips"),
        ("pretrain.py", ["--view_seconds", "1"], "view_seconds is for objectives that compare clips"),
        ("pretrain.py", ["--view_augmentations", "speed=1"], "view_augmentations is for objectives that compare"),
        ("pretrain.py", ["--objectives", "siamese", "--clips_per_label", "8"], "clips_per_label is of label_column"),
        ("pretrain.py", ["--probe_clips", "8"], "probe_clips is of the clips of probe_corpus: name a source"),
        ("pretrain.py", ["--probe_layers", "1"], "probe_layers is of the clips of probe_corpus: name a source"),
        ("pretrain.py", ["--objectives", "bestrq=1"], "unknown objective 'bestrq': expected one of info_nce"),
        ("pretrain.py", ["--objectives", "best_rq=nan"], "weight of best_rq must be a positive number"),
        ("pretrain.py", ["--objective_options", "best_rq.size=2"], "has no option size: it takes num_codebooks"),
        ("pretrain.py", ["--objective_options", "wav2vec2.temperature=2"], "with one of best_rq, found wav2vec2"),
        ("pretrain.py", ["--encoder", "huge"], "encoder 'huge': expected tiny, small, base, large, starter, a folder"),
        ("pretrain.py", ["--encoder_options", "width=3"], "SpeechCLConfig has no field width"),
        ("pretrain.py", ["--per_device_train_batch_size", "4"], "batches are measured in seconds, set max_seconds"),
        ("pretrain.py", ["--auto_find_batch_size", "True"], "auto_find_batch_size is not used: batches are measured"),
        ("finetune_ctc.py", ["--label_smoothing_factor", "0.1"], "label_smoothing_factor is not used: no loss here"),
        ("pretrain.py", ["--optim", "schedule_free_adamw"], "optim=schedule_free_adamw: its averaged weights"),
        ("pretrain.py", ["--train_sampling_strategy", "sequential"], "train_sampling_strategy is not used: batches"),
        ("pretrain.py", ["--remove_unused_columns", "True"], "remove_unused_columns is not used: batches are made by"),
        ("pretrain.py", ["--corpus", "/no/such"], "no folder or file /no/such"),
        ("pretrain.py", ["--maxsteps", "3"], "unknown options: --maxsteps 3"),
        ("pretrain.py", ["--mask_span", "0"], "mask_span must be positive"),
        ("pretrain.py", ["--max_steps", "many"], "invalid int value: 'many'"),
        ("pretrain.py", ["--config", "/no/such.yaml"], "/no/such.yaml: no such file"),
        ("finetune_ctc.py", ["--model", "huge"], "model 'huge': expected tiny, small, base, large, starter, a folder"),
        ("finetune_ctc.py", ["--casing", "title"], "casing must be lower, upper, keep, found 'title'"),
        ("finetune_ctc.py", ["--text_column", "words"], "demo has no column 'words'; it has id, audio, text"),
        ("finetune_ctc.py", ["--mask_feature_span", "100"], "mask_feature_span (100) exceeds the 80 mel bins"),
        ("finetune_ctc.py", ["--mask_time_prob", "-1"], "mask_time_prob must not be negative"),
        ("evaluate.py", ["--text_normalization", "upper"], "unknown text normalisation 'upper'"),
    ],
)
def test_wrong_option_stops_the_script_with_its_name(script, arguments, message, tmp_path, capsys):
    output = [] if script == "evaluate.py" else ["--use_cpu", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        SCRIPTS[script].main([*output, *arguments])
    assert getattr(error.value, "code", 2) == 2
    assert message in f"{error.value}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    text = capsys.readouterr().out
    assert f"python scripts/{script}" in text
    assert "--config" in text


def test_configuration_file_sets_options_and_the_command_line_overrides_them(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("encoder: small\nlearning_rate: 1e-3\nobjectives: [wav2vec2=2]\nmax_steps: 7\nuse_cpu: true\n")
    types = [PretrainingModelArguments, PretrainingDataArguments, SpeechTrainingArguments]
    argv = ["--config", str(file), "--max_steps", "9", "--output_dir", str(tmp_path)]
    model, data, training = parse_arguments(types, "", argv)
    assert (model.encoder, model.objectives, training.learning_rate, training.max_steps) == (
        "small",
        ["wav2vec2=2"],
        1e-3,
        9,
    )
    assert data.mask_span == 0.2


def test_scalars_and_lists_in_a_configuration_file_mean_the_same(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("corpus: my_audio\nobjectives: best_rq=2\n")
    model, data = parse_arguments([PretrainingModelArguments, PretrainingDataArguments], "", ["--config", str(file)])
    assert (data.corpus, model.objectives) == (["my_audio"], ["best_rq=2"])


def test_same_model_from_scratch_has_the_architecture_and_none_of_the_weights(road, tmp_path):
    finetune_ctc.main([
        "--model", str(road["folder"] / "encoder"), "--from_scratch",
        "--output_dir", str(tmp_path / "scratch"), "--seed", "7", "--max_steps", "1", "--learning_rate", "0",
        "--head_learning_rate", "0", *FAST_RUN,
    ])  # fmt: skip
    scratch, tuned = (
        AutoModelForCTC.from_pretrained(folder) for folder in (tmp_path / "scratch", road["folder"] / "ctc")
    )
    assert {n: p.shape for n, p in scratch.named_parameters()} == {n: p.shape for n, p in tuned.named_parameters()}
    weights = [model.speechcl.layers[0].attention.q_proj.weight.flatten() for model in (scratch, tuned)]
    assert torch.corrcoef(torch.stack(weights))[0, 1].abs() < 0.1
    card = (tmp_path / "scratch" / "README.md").read_text()
    assert "2 layers of 32, 2 heads" in card
    assert "trained from scratch" in card
    assert scratch.config.objectives is None


def test_from_scratch_has_the_usual_text_policy_whatever_the_recogniser_of_that_shape_had(road, tmp_path):
    shutil.copytree(road["folder"] / "ctc", tmp_path / "upper")
    config = json.loads((tmp_path / "upper/config.json").read_text())
    (tmp_path / "upper/config.json").write_text(
        json.dumps({**config, "text_policy": {**config["text_policy"], "casing": "upper"}})
    )
    argv = ["--model", str(tmp_path / "upper"), "--from_scratch", "--output_dir", str(tmp_path / "anew")]
    finetune_ctc.main([*argv, "--max_steps", "1", *FAST_RUN])
    assert json.loads((tmp_path / "anew/config.json").read_text())["text_policy"]["casing"] == "lower"


@pytest.mark.parametrize(("config", "millions"), [("quickstart_pretrain", 4.8), ("cpu-10min", 5.0), ("cpu-1h", 5.0)])
def test_configuration_of_a_preset_builds_its_model(config, millions, tmp_path):
    model, *_ = parse_arguments(
        [PretrainingModelArguments, PretrainingDataArguments, SpeechTrainingArguments],
        "",
        ["--config", str(ROOT / f"scripts/configs/{config}.yaml"), "--use_cpu", "True", "--output_dir", str(tmp_path)],
    )
    units = SimpleNamespace(fill=lambda options, where: options) if "hubert" in model.objectives else None
    assert build_model(model, units).num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


def test_unknown_option_in_a_configuration_file_is_named(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("encodr: small\n")
    with pytest.raises(SystemExit):
        parse_arguments([PretrainingModelArguments], "", ["--config", str(file)])
    assert "unknown options: encodr" in capsys.readouterr().err


def test_a_configuration_file_may_say_no_and_nothing(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("eval_strategy: no\npseudo_labels: []\nuse_cpu: true\ndataloader_pin_memory: false\ncorpus: [no]\n")
    _, data, *_, args = parse_arguments(
        finetune_ctc.ARGUMENTS, "", ["--config", str(file), "--output_dir", str(tmp_path)]
    )
    assert (args.eval_strategy, args.use_cpu, args.dataloader_pin_memory) == ("no", True, False)
    assert (data.pseudo_labels, data.corpus) == ([], ["no"])


def test_null_in_a_configuration_file_is_none_and_mappings_are_assignments(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(
        "save_total_limit: null\nunits: null\nobjectives: {best_rq: 1.0}\nuse_cpu: true\n"
        "objective_options: {best_rq.codebook_size: 64, best_rq.num_codebooks: 2}\n"
    )
    argv = ["--config", str(file), "--output_dir", str(tmp_path)]
    types = [PretrainingModelArguments, PretrainingDataArguments, SpeechTrainingArguments]
    model, data, args = parse_arguments(types, "", argv)
    assert (args.save_total_limit, data.units) == (None, None)
    assert model.objectives == ["best_rq=1.0"]
    assert parse_assignments(model.objective_options, "") == {"best_rq.codebook_size": 64, "best_rq.num_codebooks": 2}
    assert parse_arguments(types, "", [*argv, "--save_total_limit", "3"])[2].save_total_limit == 3
    file.write_text("objective_options: {}\nmask_span: null\n")
    with pytest.raises(SystemExit):
        parse_arguments(types, "", argv)
    assert "mask_span is null, which is no value for it: leave it out" in capsys.readouterr().err


def test_assignments_and_objectives():
    assert parse_assignments(["a=1", "b.c=0.5", "d=1e-3", "e=x", "f=true"], "field") == {
        "a": 1, "b.c": 0.5, "d": 0.001, "e": "x", "f": True,
    }  # fmt: skip
    assert parse_objectives(["best_rq", "wav2vec2=0.5"], ["wav2vec2.temperature=0.2"]) == {
        "best_rq": {"weight": 1.0},
        "wav2vec2": {"weight": 0.5, "temperature": 0.2},
    }
    with pytest.raises(ValueError, match="field: expected NAME=VALUE, found 'a'"):
        parse_assignments(["a"], "field")
    with pytest.raises(ValueError, match=r"field: 'a=\[' is not YAML"):
        parse_assignments(["a=["], "field")


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configurations_hold_known_options(file, tmp_path):
    types = finetune_ctc.ARGUMENTS if "ctc" in file.name else pretrain.ARGUMENTS
    *_, args = parse_arguments(types, "", ["--config", str(file), "--use_cpu", "True", "--output_dir", str(tmp_path)])
    assert args.learning_rate == float(yaml.safe_load(file.read_text())["learning_rate"])


def test_accelerate_launch_runs_the_script(tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "scripts" / "pretrain.py"), "--output_dir",
        str(tmp_path / "run"), "--max_steps", "1", "--encoder_options", *TINY_OPTIONS, *FAST_RUN,
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_pinned_versions_satisfy_the_ranges_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    lowest = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)', pyproject.split("[project]")[1]))
    constraints = (ROOT / "scripts" / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([A-Za-z0-9_-]+)==([0-9.]+)$", constraints, re.M))
    assert set(pinned) - {"pyctcdecode"} == set(lowest)  # installed on its own, see environment.sh
    for name, version in lowest.items():
        assert [int(part) for part in pinned[name].split(".")] >= [int(part) for part in version.split(".")]


def test_one_view_of_each_clip_is_enough_with_labels_and_refused_without(corpus):
    options = {"k_shot": 2, "n_query": 2, "num_views": 1, "proj_dim": 8}
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives={"prototypical": options}))
    rows = corpus.select(range(6))
    labelled = SpeechDataset(rows.add_column("label", ["a", "b"] * 3), 16000)
    batch = build_collator(model, PretrainingDataArguments(), labelled)([labelled[0, row] for row in range(6)])
    batch.pop("num_skipped")
    assert len(batch["view_values"]) == 6
    assert model(**batch).objectives["prototypical"].num_items == 2
    with pytest.raises(ValueError, match=r"num_views=1, but without label_column .* at least k_shot \+ 1 = 3"):
        check_options(PretrainingDataArguments(), model)
    with pytest.raises(ValueError, match=r"num_views=1 of clips_per_label=2 clips leave no query beside k_shot=2"):
        check_options(PretrainingDataArguments(label_column="label", clips_per_label=2), model)
