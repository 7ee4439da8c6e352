"""Classifiers: rates, classes, gradients over micro-batches, and a run to its pipeline."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from hf_speechcl import SpeechCLConfig, SpeechCLForSequenceClassification, SpeechDataset
from hf_speechcl.data import ClassificationCollator
from hf_speechcl.evaluation.classification import classification_rates
from hf_speechcl.training.finetune_classifier import ClassificationTrainer, ClassifierTrainingArguments, class_names
from hf_speechcl.training.finetune_classifier import main as finetune_classifier
from hf_speechcl.training.finetuning import FineTuningModelArguments
from tests.conftest import SHORT_RUN, TINY, TINY_OPTIONS, as_items


def test_new_weights_have_no_classes_of_before():
    config = SpeechCLConfig(**TINY, architectures=["SpeechCLForSequenceClassification"], id2label={0: "no", 1: "on"})
    further, anew = (FineTuningModelArguments(model="a/b", from_scratch=new) for new in (False, True))
    assert class_names(further, config, ["a", "b", None], "word") == ["no", "on"]
    assert class_names(anew, config, ["a", "b", None], "word") == ["a", "b"]


def test_classification_rates_of_known_predictions():
    rates = classification_rates([0, 0, 1, 2, 2, -1], [0, 0, 1, 1, 2, 0])
    assert rates["accuracy"] == pytest.approx(4 / 6)
    f1 = [2 * 2 / (2 + 3), 2 * 1 / (1 + 2), 2 * 1 / (2 + 1)]  # -1 is wrong, but no class
    assert rates["macro_f1"] == pytest.approx(np.mean(f1))
    assert rates["majority"] == 0.5
    for name in ("accuracy", "macro_f1"):
        assert rates[f"{name}_low"] < rates[name] < rates[f"{name}_high"]
    perfect = classification_rates([0, 1], [0, 1])
    assert (perfect["accuracy"], perfect["macro_f1"], perfect["macro_f1_low"]) == (1, 1, 1)


def test_classifier_gradient_of_one_batch_equals_that_of_unequal_micro_batches(corpus, clips, tmp_path):
    model = SpeechCLForSequenceClassification(SpeechCLConfig(**TINY, num_labels=3))
    dataset = SpeechDataset(corpus.select(range(5)), 16000)
    collate = ClassificationCollator(model._get_feat_extract_output_lengths, [0, 1, 2, 0, 1])
    trainer = ClassificationTrainer(
        model=model,
        args=ClassifierTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        references=collate.labels,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collate,
        max_seconds_per_batch=20,
    )
    items, silent = as_items(clips), {**as_items(clips)[0], "input_values": None}
    gradients = []
    for parts in ([items], [items[:1], [silent], items[1:]]):
        model.zero_grad()
        batches, counts = trainer.get_batch_samples(iter([collate(part) for part in parts]), len(parts), "cpu")
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(model, batch, counts)
        gradients.append(model.classifier.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


WITHOUT_PACKAGE = """
import sys, numpy as np

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_speechcl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from transformers import pipeline

classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
print("named", classifier(np.load(sys.argv[2]), top_k=1)[0]["label"])
assert not any(name.startswith("hf_speechcl") for name in sys.modules)
"""


def test_classifier_learns_and_runs_in_the_pipeline_with_and_without_the_package(clips, tmp_path):
    folder, run = tmp_path / "corpus", tmp_path / "run"
    rows = {"train": 12, "validation": 6}
    for split, count in rows.items():
        (folder / split).mkdir(parents=True)
        lines = ["file_name,loudness"]
        for number in range(count):
            loudness = "loud" if number % 2 else "quiet"
            clip = clips[number % len(clips)][:16000] * (1.0 if number % 2 else 0.001)
            soundfile.write(folder / split / f"{number}.wav", clip, 16000, subtype="FLOAT")
            lines.append(f"{number}.wav,{loudness}")
        if split == "validation":
            soundfile.write(folder / split / "odd.wav", clip, 16000)
            lines.append("odd.wav,deafening")
        (folder / split / "metadata.csv").write_text("\n".join(lines))
    finetune_classifier(
        ["--corpus", str(folder), "--label_column", "loudness", "--output_dir", str(run), "--model", "tiny"]
        + ["--model_options", *TINY_OPTIONS, *SHORT_RUN, "--max_steps", "20", "--eval_steps", "20"]
        + ["--save_steps", "20", "--learning_rate", "3e-3", "--mask_time_prob", "0", "--num_feature_masks", "0"]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["eval_accuracy"] == results["eval_macro_f1"] == 1
    assert results["eval_majority"] == 0.5
    card = (run / "README.md").read_text()
    assert "pipeline_tag: audio-classification" in card
    assert "`loud`, `quiet`" in card
    assert str(tmp_path) not in card
    classifier = pipeline("audio-classification", model=str(run))
    assert classifier.model.config.label2id == {"loud": 0, "quiet": 1}
    quiet = clips[0] * 0.001
    assert classifier(quiet)[0]["label"] == "quiet"
    np.save(tmp_path / "quiet.npy", quiet)
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(run), str(tmp_path / "quiet.npy")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert "named quiet" in found.stdout, found.stderr
