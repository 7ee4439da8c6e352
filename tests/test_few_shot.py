"""The few-shot classifier, the episodes it is measured on, and the script that measures it."""

import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2Config

from hf_speechcl import (
    SpeechCLConfig,
    SpeechCLForCTC,
    SpeechCLForPreTraining,
    SpeechCLModel,
    load_corpus,
)
from hf_speechcl.evaluation.episodes import EpisodeSampler, score_episodes
from hf_speechcl.evaluation.few_shot import PrototypicalClassifier
from hf_speechcl.evaluation.nearest_prototype import NearestPrototype
from tests.conftest import SMALL_OBJECTIVES, TINY, run_script

PITCHES = {"low": 150, "middle": 900, "high": 4000}


def tone(pitch, number, seconds=None):
    """A tone in noise, 0.3 to 0.8 s long."""
    rng = np.random.default_rng([pitch, number])
    time = np.arange(int(16000 * (seconds or rng.uniform(0.3, 0.8)))) / 16000
    waveform = 0.3 * np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6)) + 0.01 * rng.standard_normal(len(time))
    return waveform.astype(np.float32)


def tones(numbers):
    pairs = [(tone(pitch, number), label) for label, pitch in PITCHES.items() for number in numbers]
    return [waveform for waveform, _ in pairs], [label for _, label in pairs]


def pretraining_model(*names):
    objectives = {name: SMALL_OBJECTIVES[name] for name in names}
    return SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))


def classifier_of(kind, **options):
    """A new classifier on statistics, or on the projector of an objective."""
    if kind == "statistics":
        return PrototypicalClassifier(SpeechCLModel(SpeechCLConfig(**TINY)), **options)
    names = ("best_rq", "info_nce", "prototypical") if kind == "prototypical" else (kind,)
    return PrototypicalClassifier(pretraining_model(*names), projector=True, **options)


KINDS = ("statistics", "prototypical", "info_nce")


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_depend_on_nothing_else_in_the_batch(kind, clips):
    classifier = classifier_of(kind, max_seconds_per_batch=1000)
    classifier.model.train()
    together = classifier.embed(clips)
    alone = torch.cat([classifier.embed([clip]) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert together.shape[1] == (2 * TINY["hidden_size"] if kind == "statistics" else 12)


def test_embedding_is_that_of_the_objective_in_evaluation(clips):
    model = pretraining_model("prototypical").eval()
    objective = model.objectives["prototypical"]
    objective.batch_norm.running_mean.normal_()
    batch = {"view_values": torch.from_numpy(clips[0])[None].repeat(3, 1), "clip_labels": torch.tensor([0])}
    output = objective(model.speechcl, batch | {"clip_keys": torch.tensor([0])})
    embedded = PrototypicalClassifier(model, projector=True).embed(clips[:1])
    torch.testing.assert_close(embedded, output.states["embeddings"][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_differ_are_told_apart_and_come_back_from_a_folder(kind, tmp_path):
    classifier = classifier_of(kind).fit(*tones(range(4)))
    waveforms, labels = tones(range(10, 15))
    assert classifier.predict(waveforms) == labels
    probabilities = classifier.predict_proba(waveforms)
    assert classifier.classes == list(PITCHES)
    assert [classifier.classes[place] for place in probabilities.argmax(-1)] == labels
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)

    classifier.save(tmp_path / "voices")
    loaded = PrototypicalClassifier.load(tmp_path / "voices")
    assert loaded.classes == classifier.classes
    np.testing.assert_array_equal(loaded.predict_proba(waveforms), probabilities)
    names = {path.name for path in (tmp_path / "voices").iterdir()}
    assert names >= {"model.safetensors", "prototypes.safetensors", "classes.json"}
    assert {name.rsplit(".")[-1] for name in names} == {"safetensors", "json", "py"}
    loaded.fit(waveforms, [PITCHES[label] for label in labels])
    assert loaded.predict(waveforms[-1:]) == [PITCHES["high"]]


def test_statistics_are_those_of_the_layer(clips, tmp_path):
    model = pretraining_model("prototypical").eval()
    states = model.speechcl(torch.from_numpy(clips[0])[None], output_hidden_states=True).hidden_states[1][0]
    classifier = PrototypicalClassifier(model, layer=1)
    expected = torch.cat([states.mean(0), (states.var(0, correction=0) + 1e-5).sqrt()])
    torch.testing.assert_close(classifier.embed(clips[:1])[0], expected, rtol=1e-4, atol=1e-5)
    last = PrototypicalClassifier(model, layer=TINY["num_hidden_layers"])
    assert torch.equal(last.embed(clips), PrototypicalClassifier(model).embed(clips))
    classifier.fit(clips[:2], [1, 2]).save(tmp_path)
    loaded = PrototypicalClassifier.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(clips), classifier.predict_proba(clips))
    assert (loaded.layer, loaded.predict(clips[:2])) == (1, [1, 2])


def test_models_of_other_kinds_give_their_encoder(clips, tmp_path):
    model = SpeechCLForCTC(SpeechCLConfig(**TINY, objectives={"info_nce": {}}))
    model.save_pretrained(tmp_path)
    embedded = PrototypicalClassifier(model.speechcl).embed(clips)
    assert torch.equal(PrototypicalClassifier(model).embed(clips), embedded)
    assert torch.equal(PrototypicalClassifier(tmp_path).embed(clips), embedded)


@pytest.mark.parametrize(
    ("waveforms", "labels", "message"),
    [
        ([], [], "waveforms is empty"),
        ([tone(200, 0)], ["a", "b"], "labels must be as many as waveforms, found 2 for 1"),
        ([tone(200, 0)] * 2, ["a", "a"], "labels must be of two classes at least, found .'a'."),
        ([tone(200, 0)] * 2, ["a", ""], r"labels\[1\] must be a text or a whole number, found ''"),
        ([tone(200, 0)] * 2, ["a", None], r"labels\[1\] must be a text or a whole number, found None"),
        ([tone(200, 0), tone(200, 0, 0.05)], ["a", "b"], r"waveforms\[1\] is too short: 800 samples at 16000 Hz"),
        (
            [tone(200, 0)[None]] * 2,
            ["a", "b"],
            r"waveforms\[0\] must be a 1-D array of floats in \[-1, 1\], found float32",
        ),
        ([np.zeros(9000, dtype=np.int16)] * 2, ["a", "b"], "found int16 .* divide whole numbers"),
        ([np.full(9000, np.nan)] * 2, ["a", "b"], r"waveforms\[0\] holds values that are not finite"),
    ],
)
def test_clips_and_labels_that_cannot_be_fitted_are_refused_by_place(config, waveforms, labels, message):
    with pytest.raises(ValueError, match=message):
        PrototypicalClassifier(SpeechCLModel(config)).fit(waveforms, labels)


def test_classifiers_that_cannot_be_used_are_refused(config, tmp_path):
    classifier = PrototypicalClassifier(SpeechCLModel(config))
    with pytest.raises(ValueError, match="no classes yet: call fit"):
        classifier.predict([tone(200, 0)])
    with pytest.raises(ValueError, match="no classes to save: call fit"):
        classifier.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no classes.json in .* PrototypicalClassifier.save"):
        PrototypicalClassifier.load(tmp_path)
    with pytest.raises(ValueError, match="layer must be between 0 and 2, found 3"):
        PrototypicalClassifier(SpeechCLModel(config), layer=3)
    with pytest.raises(ValueError, match="projector: the model has none"):
        PrototypicalClassifier(pretraining_model("best_rq"), projector=True)
    with pytest.raises(ValueError, match="projector takes the last layer, found layer=1"):
        PrototypicalClassifier(pretraining_model("info_nce"), layer=1, projector=True)
    with pytest.raises(ValueError, match="model 'nowhere': expected a folder or a Hub name"):
        PrototypicalClassifier("nowhere")
    Wav2Vec2Config().save_pretrained(tmp_path / "wav2vec2")
    with pytest.raises(ValueError, match="wav2vec2 is a wav2vec2 model: expected one that hf_speechcl pre-trained"):
        PrototypicalClassifier(tmp_path / "wav2vec2")
    with pytest.raises(ValueError, match="model must be a SpeechCL model, a folder or a Hub name, found Linear"):
        PrototypicalClassifier(torch.nn.Linear(2, 2))


def test_clips_of_an_unknown_group_are_in_no_episode():
    sampler = EpisodeSampler(
        ["a", "b"] * 6, n_way=2, k_shot=1, n_query=9, min_clips=2, groups=[None] * 4 + [0] * 4 + [1] * 4
    )
    assert {row for parts in sampler.members.values() for part in parts for row in part} == set(range(4, 12))


def test_episodes_never_ask_for_an_example_and_keep_groups_apart():
    labels = ["a"] * 9 + ["b"] * 9 + ["c"] * 9 + [None] + ["few"] * 3
    groups = [number % 2 for number in range(len(labels))]
    for chosen in (None, groups):
        sampler = EpisodeSampler(labels, n_way=2, k_shot=3, n_query=10, min_clips=4, groups=chosen)
        assert set(sampler.members) == {"a", "b", "c"}
        rng, asked = np.random.default_rng(0), set()
        for _ in range(50):
            episode = sampler.draw(rng)
            assert len(episode) == 2
            for label, part in episode.items():
                assert len(set(part.support) | set(part.queries)) == 3 + len(part.queries)
                assert {labels[row] for row in (*part.support, *part.queries)} == {label}
                if chosen is None:
                    assert len(part.queries) == 6
                else:
                    assert len({groups[row] for row in part.support}) == 1
                    assert {groups[row] for row in part.support}.isdisjoint(groups[row] for row in part.queries)
            asked |= set(episode)
        assert asked == {"a", "b", "c"}
    with pytest.raises(
        ValueError, match="4 classes are needed, and 3 have enough clips .at least 4.* there are: a 9, b 9, c 9, few 3"
    ):
        EpisodeSampler(labels, n_way=4, k_shot=3, n_query=10, min_clips=3)


def test_episode_scores_are_exact_for_certain_and_for_equal_vectors():
    labels = ["a"] * 8 + ["b"] * 8 + ["c"] * 8
    sampler = EpisodeSampler(labels, n_way=2, k_shot=2, n_query=3, min_clips=5)
    apart = torch.eye(3).repeat_interleave(8, 0)
    for rule in (NearestPrototype("euclidean", 1.0, False), NearestPrototype("cosine", 0.1, True)):
        scores = score_episodes(apart, rule, sampler, num_episodes=40, seed=0)
        assert (scores["accuracy"], scores["interval"], scores["lowest_set"]) == (1, 0, 1)
        assert scores["by_class"] == {"a": 1, "b": 1, "c": 1}
    same = score_episodes(torch.ones(24, 3), NearestPrototype("euclidean", 1.0, False), sampler, 40, 0)
    assert same["accuracy"] == 0.5


def test_prototypes_are_means_of_standardized_vectors():
    vectors, labels = torch.randn(6, 4) * 3 + 5, ["b", "a", "b", "a", "a", "b"]
    rule = NearestPrototype("cosine", 0.5, standardize=True).fit(vectors, labels)
    standard = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    means = torch.stack([standard[[0, 2, 5]].mean(0), standard[[1, 3, 4]].mean(0)])
    expected = torch.nn.functional.cosine_similarity(standard[:, None], means[None], dim=-1) / 0.5
    torch.testing.assert_close(rule.logits(vectors), expected)
    assert rule.classes == ["b", "a"]


def test_script_scores_a_folder_with_labels_in_its_metadata(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = ["file_name,pitch,room"]
    for label, pitch in PITCHES.items():
        for number in range(7):
            soundfile.write(folder / f"{label}{number}.wav", tone(pitch, number, 0.4 if number == 6 else 0.6), 16000)
            lines.append(f"{label}{number}.wav,{label},room{number % 2}")
    soundfile.write(folder / "unlabelled.wav", tone(440, 0, 0.6), 16000)
    (folder / "metadata.csv").write_text("\n".join([*lines, "unlabelled.wav,,room0"]))
    pretraining_model("prototypical").save_pretrained(tmp_path / "model")
    result = run_script(
        "benchmarks/few_shot.py", "--models", tmp_path / "model", "--corpus", folder, "--splits", "train",
        "--label_column", "pitch", "--group_column", "room", "--n_way", 2, "--k_shot", 2, "--min_clips", 4,
        "--max_clips", 2, "--episodes", 60, "--output_file", tmp_path / "out" / "scores.json",
    )  # fmt: skip
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["clips"] == {"high": 4, "low": 4, "middle": 4}
    assert scores["chance"] == 0.5
    untrained = [f"untrained encoder, seed {seed}" for seed in range(3)]
    assert list(scores["results"]) == [
        str(tmp_path / "model"), *untrained, "log-mel means", "log-mel means and deviations",
    ]  # fmt: skip
    assert scores["results"]["log-mel means"]["accuracy"] == 1
    assert scores["results"]["untrained encoder, seed 0"]["class_sets"] == 3
    assert "| log-mel means | 100.0% ± 0.0% | 100.0% to 100.0% |" in result.stdout
    assert load_corpus(str(folder), label_column="room")["label"][0] == "room0"
