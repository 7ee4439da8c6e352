"""Probes of phones: labels of frames, the linear probe, ABX, the script, and probes while an encoder is trained."""

import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import Wav2Vec2Config, Wav2Vec2Model

from hf_speechcl import SpeechCLConfig, SpeechCLModel, load_corpus
from hf_speechcl.data.phones import PhoneClip, load_phone_clips
from hf_speechcl.evaluation.abx import abx_error, draw_triples, dtw_distances
from hf_speechcl.evaluation.probe import PhoneProbe, linear_probe
from hf_speechcl.features import HiddenStates, StackedLogMel
from hf_speechcl.training.pretrain import main as pretrain
from tests import reference
from tests.conftest import FAST_RUN, TINY, TINY_OPTIONS, launch, run_script

PHONES = ("p", "o", "n", "i")
RUN = [
    *FAST_RUN,
    "--encoder_options",
    *TINY_OPTIONS[:-3],
    "hidden_dropout=0.1",
    "--max_steps",
    "4",
    "--eval_steps",
    "2",
]
RUN += ["--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", "2"]


def write_phones(folder, corpus, clips=20, **changed):
    """A parquet file of clips of the embedded corpus, with made-up phones of 0.1 s; `changed` replaces columns."""
    rows = corpus.select(range(clips))
    counts = [int(seconds / 0.1) for seconds in rows["duration"]]
    columns = {
        "id": rows["id"][:],
        "audio": rows["audio"][:],
        "duration": rows["duration"][:],
        "phones": [["pau", *(PHONES[place % 4] for place in range(count - 1))] for count in counts],
        "phone_ends": [[0.1 * (place + 1) for place in range(count)] for count in counts],
    }
    columns = {name: values for name, values in {**columns, **changed}.items() if values is not None}
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def phones(tmp_path_factory, corpus):
    return write_phones(tmp_path_factory.mktemp("phones") / "corpus", corpus)


@pytest.fixture
def tokens():
    """18 tokens of 1 to 5 frames of three categories and two groups, as frames, starts and counts."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 18)
    return rng.standard_normal((counts.sum(), 3)), np.cumsum(counts) - counts, counts


# ---- which frames are of which phone ----


def make_clip(phones, ends, seconds=1.0):
    return PhoneClip(np.zeros(round(16000 * seconds), np.float32), phones, np.array(ends), "")


def test_frame_has_the_phone_at_its_centre():
    # Centres at 0.02, 0.06, 0.10, 0.14, 0.18, 0.22; one that is exactly at an end is of the phone that begins there.
    clip = make_clip(["a", "b", "c"], [0.05, 0.1, 0.2])
    np.testing.assert_array_equal(clip.phone_of_frames(6, 0.04), [0, 1, 2, 2, 2, -1])


def test_phone_has_the_frames_whose_centres_are_in_it_and_one_at_least():
    clip = make_clip(["a", "b", "c", "d", "e"], [0.05, 0.1, 0.13, 0.135, 0.24])
    starts, counts = clip.segments(6, 0.04)
    np.testing.assert_array_equal(starts, [0, 1, 2, 3, 3])  # d, 0.130 to 0.135, has no centre: frame 3 is around it
    np.testing.assert_array_equal(counts, [1, 1, 1, 1, 3])
    starts, counts = make_clip(["a", "b"], [0.2, 0.25]).segments(6, 0.04)  # beyond the last frame's end
    np.testing.assert_array_equal(starts[:1], [0])
    np.testing.assert_array_equal([starts[1], counts[1]], [5, 1])


def test_frames_of_labels_and_segments_agree(phones):
    for clip in load_phone_clips(str(phones), "train", 16000, 5):
        starts, counts = clip.segments(30, 0.04)
        labels = clip.phone_of_frames(30, 0.04)
        for number in range(min(10, len(clip.phones))):
            assert labels[starts[number] : starts[number] + counts[number]].tolist() == [number] * counts[number]


def test_clips_are_drawn_by_the_seed(phones):
    drawn = [
        [len(clip.samples) for clip in load_phone_clips(str(phones), "train", 16000, 6, seed)] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_clips_that_cannot_be_used_are_named_and_left_out(tmp_path, corpus, caplog):
    audio = corpus.select(range(6))["audio"][:]
    audio[0] = {"bytes": b"no audio", "path": "a"}
    ends, labels = [[0.1, 0.2]] * 6, [["a", "b"]] * 6
    ends[1], ends[2], ends[3], labels[4] = [0.2, 0.1], [0.1], [90.0, 91.0], None
    folder = write_phones(tmp_path / "bad", corpus, 6, audio=audio, phones=labels, phone_ends=ends)
    with caplog.at_level("INFO", "hf_speechcl"):
        (clip,) = load_phone_clips(str(folder), "train", 16000, 60)
    assert clip.phones == ["a", "b"]
    assert "1 of 6 are taken, 5 skipped" in caplog.text
    names = corpus["id"][:6]
    for name, reason in zip(
        names, ["not readable", "do not rise", "2 phones with 1 ends", "no phone ends", "0 phones"]
    ):
        assert re.search(rf"skipped {re.escape(name)}: .*{reason}", caplog.text), (name, reason)


def test_corpora_without_phones_are_refused_with_what_is_expected(tmp_path, corpus, audio_folder):
    lists = r"expected phones \(list of string\) and phone_ends \(list of double\)"
    folder = write_phones(tmp_path / "no_ends", corpus, 2, phone_ends=None)
    with pytest.raises(ValueError, match=f"has no column 'phone_ends'; it has id, .*phones: {lists}"):
        load_phone_clips(str(folder), "train", 16000, 2)
    with pytest.raises(ValueError, match="has no column 'phones' and 'phone_ends'"):
        load_phone_clips("demo", "validation", 16000, 2)
    folder = write_phones(tmp_path / "texts", corpus, 2, phones=["a b", "c"])
    with pytest.raises(ValueError, match=f"the column 'phones' holds string, {lists}"):
        load_phone_clips(str(folder), "train", 16000, 2)
    with pytest.raises(ValueError, match="is a folder of audio files, and phones .* give parquet files"):
        load_phone_clips(str(audio_folder), "train", 16000, 2)
    folder = write_phones(tmp_path / "null", corpus, 2, phones=pyarrow.nulls(2, pyarrow.list_(pyarrow.string())))
    with pytest.raises(ValueError, match="no clip with phones and phone_ends that can be used"):
        load_phone_clips(str(folder), "train", 16000, 2)


# ---- the linear probe ----


def test_probe_finds_labels_that_a_line_tells_and_no_others():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1200)
    frames = (5 + 100 * (np.eye(4)[labels] + 0.1 * rng.standard_normal((1200, 4)))).astype(np.float32)
    assert linear_probe(frames[:600], labels[:600], frames[600:], labels[600:]) > 0.99
    shuffled = rng.permutation(labels)
    assert linear_probe(frames[:600], shuffled[:600], frames[600:], shuffled[600:]) == pytest.approx(0.25, abs=0.06)
    assert linear_probe(frames[:600], labels[:600], frames[600:], labels[600:] + 4) == 0


def test_probe_refuses_a_single_label():
    with pytest.raises(ValueError, match="frames of two phones at least, found 1: give more clips"):
        linear_probe(np.ones((3, 2)), np.zeros(3), np.ones((3, 2)), np.zeros(3))


# ---- ABX ----


def test_dtw_equals_plain_loops(tokens, monkeypatch):
    monkeypatch.setattr("hf_speechcl.evaluation.abx.FRAMES_AT_ONCE", 20)  # several batches
    frames, starts, counts = tokens
    unit = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    first, second = (grid.ravel() for grid in np.meshgrid(range(18), range(18)))
    expected = [
        reference.dtw_distance(frames[starts[i] :][: counts[i]], frames[starts[j] :][: counts[j]])
        for i, j in zip(first, second)
    ]
    np.testing.assert_allclose(dtw_distances(unit, starts, counts, first, second), expected, atol=1e-7)


def test_abx_of_all_triples_equals_plain_loops(tokens):
    frames, starts, counts = tokens
    categories = list("aaabbbbccaabbcccbb")
    groups = ["one"] * 9 + ["two"] * 9
    categories[9:] = list("aabbbcbba")  # c comes once in the second group: as B only
    found = abx_error(frames, starts, counts, draw_triples(categories, groups, min_tokens=2))
    lists = [frames[start : start + count] for start, count in zip(starts, counts)]
    assert found["abx_error"] == pytest.approx(reference.abx_error(lists, categories, groups), abs=1e-12)
    assert found["abx_pairs"] == 3
    assert 0.2 < found["abx_error"] < 0.8


def test_abx_is_nothing_for_separated_and_half_for_identical_distributions():
    rng = np.random.default_rng(0)
    categories = ["a", "b", "c"] * 40
    starts, counts = np.arange(120) * 2, np.full(120, 2)
    noise = rng.standard_normal((240, 8))
    triples = draw_triples(categories, [""] * 120, max_triples=3000)
    assert len(triples.x) == 3000
    means = np.repeat(np.tile(np.eye(8)[:3], (40, 1)), 2, axis=0)
    assert abx_error(means + 0.01 * noise, starts, counts, triples)["abx_error"] == 0
    assert abx_error(noise, starts, counts, triples)["abx_error"] == pytest.approx(0.5, abs=0.05)
    assert abx_error(np.ones((240, 8)), starts, counts, triples)["abx_error"] == pytest.approx(0.5, abs=1e-9)  # ties
    again = draw_triples(categories, [""] * 120, max_triples=3000)
    np.testing.assert_array_equal(again.b, triples.b)


def test_triples_are_of_a_group_and_every_contrast_counts_the_same():
    rng = np.random.default_rng(0)
    categories = rng.choice(list("aaaabc"), 90).tolist() + ["rare"]
    groups = rng.integers(3, size=91).tolist()
    triples = draw_triples(categories, groups, max_triples=500)
    categories, groups = np.array(categories), np.array(groups)
    assert (categories[triples.x] == categories[triples.a]).all()
    assert (categories[triples.x] != categories[triples.b]).all()
    assert (triples.x != triples.a).all()
    assert ((groups[triples.x] == groups[triples.a]) & (groups[triples.x] == groups[triples.b])).all()
    assert "rare" not in categories[np.concatenate([triples.x, triples.b])]
    assert 400 < len(triples.x) <= 500
    np.testing.assert_allclose(np.bincount(triples.pairs, triples.weights), [1, 1, 1])
    for draw in range(2):  # more contrasts than triples
        assert len(draw_triples(list(categories), list(groups), max_triples=5, seed=draw).x) == 5
    with pytest.raises(ValueError, match="found 0 phones that often: give more clips"):
        draw_triples(["a", "b"], ["", ""], min_tokens=2)


# ---- both, on clips ----


class Told:
    """Frames that say which 0.1 s of the clip they are in, modulo 4: what the made-up phones are."""

    sampling_rate, samples_per_frame = 16000, 320

    def __call__(self, samples):
        places = (np.arange(-(-len(samples) // 320)) + 0.5) * 0.02 // 0.1
        told = np.eye(4, dtype=np.float32)[((places - 1) % 4).astype(int)]
        noise = np.random.default_rng(len(samples)).standard_normal((len(told), 4))
        return np.stack([told, noise.astype(np.float32)])


def test_frames_that_tell_phones_are_told_from_noise(phones):
    probe = PhoneProbe.load([str(phones)], ["train"], 16000, max_clips=12)
    assert (len(probe.fit), len(probe.test), list(probe.label_of)) == (6, 6, sorted(PHONES))
    told, noise = probe.measure(Told())
    assert (told["phone_accuracy"], told["abx_error"]) == (1, 0)
    assert noise["phone_accuracy"] < 0.4
    assert noise["abx_error"] == pytest.approx(0.5, abs=0.05)
    assert noise["majority"] == pytest.approx(0.25, abs=0.05)
    # Between the same neighbours there is one phone only, so far as these are made up.
    with pytest.raises(ValueError, match="ABX needs two phones"):
        PhoneProbe.load([str(phones)], ["train"], 16000, max_clips=12, same_context=True)


def test_frames_that_are_not_finite_give_no_number(phones):
    class Broken(Told):
        def __call__(self, samples):
            return super().__call__(samples)[:1] * np.nan

    (found,) = PhoneProbe.load([str(phones)], ["train"], 16000, max_clips=4, min_tokens=2).measure(Broken())
    assert np.isnan([found["phone_accuracy"], found["abx_error"]]).all()


def test_frames_capped_are_of_the_first_clips_and_have_phones(phones):
    probe = PhoneProbe.load([str(phones)], ["train"], 16000, max_clips=12, max_frames=30)
    frames = [np.full((-(-len(clip.samples) // 640), 1), number) for number, clip in enumerate(probe.fit)]
    rows, labels = probe._labelled(probe.fit, frames, 0.04)
    assert len(rows) == len(labels) == 30
    assert rows[0] == 0
    assert (np.diff(rows[:, 0]) >= 0).all()
    names = [sorted(PHONES)[label] for label in labels[:5]]
    assert names == ["p", "p", "p", "o", "o"]  # centres at 0.10 (after the silence), 0.14, 0.18, 0.22, 0.26


def test_what_a_probe_cannot_do_is_refused(phones):
    for options, message in [
        ({"splits": ["a", "b", "c"]}, "splits: expected one"),
        ({"max_clips": 1}, "max_clips must be 2 at least"),
        ({"min_tokens": 10000}, "each at least 10000 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            PhoneProbe.load([str(phones)], **{"splits": ["train"], "sampling_rate": 16000, **options})
    probe = PhoneProbe.load([str(phones)], ["train"], 8000, max_clips=8)
    with pytest.raises(ValueError, match="takes 16000 Hz, and the clips were decoded to 8000 Hz"):
        probe.measure(Told())


def test_log_mel_is_stacked_at_the_rate_of_the_encoder(config):
    model = SpeechCLModel(config).eval()
    log_mel, hidden = StackedLogMel(config), HiddenStates(model)
    for samples in (1, 640, 641, 8001):
        clip = torch.randn(samples)
        stacked = log_mel(clip)
        assert stacked.shape[1] == hidden(clip).shape[1]
        own = model.log_mel(clip[None])[0].numpy()
        np.testing.assert_array_equal(stacked[0].reshape(-1, config.num_mel_bins)[: len(own)], own)
        np.testing.assert_array_equal(stacked[0].reshape(-1, config.num_mel_bins)[-1], own[-1])


def test_hidden_states_are_those_of_the_layers_asked_for(config):
    model, clip = SpeechCLModel(config).eval(), torch.randn(5000)
    outputs = model(clip[None], output_hidden_states=True)
    expected = torch.cat([outputs.hidden_states[2], outputs.hidden_states[0]]).detach().numpy()
    np.testing.assert_array_equal(HiddenStates(model, [2, 0])(clip), expected)
    np.testing.assert_array_equal(expected[0], outputs.last_hidden_state[0].detach().numpy())
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer must be between 0 and 2, found {layer}"):
            HiddenStates(model, [layer])
    perceptron = SpeechCLConfig(num_hidden_layers=0, perceptron_dims=[256], subsampling_factor=1)
    assert HiddenStates(SpeechCLModel(perceptron).eval())(clip).shape == (1, 32, 256)


# ---- the scripts ----


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_script_prints_layers_of_encoders_of_two_families(tmp_path, phones):
    SpeechCLModel(SpeechCLConfig(**TINY)).save_pretrained(tmp_path / "speechcl")
    Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path / "wav2vec2")  # fmt: skip
    for names in (["speechcl", "wav2vec2"], ["wav2vec2"]):
        models = [str(tmp_path / name) for name in names]
        result = run_script(
            "benchmarks/probe.py", "--models", *models, "--corpus", phones, "--layers", 0, 2, "--max_clips", 8,
            "--max_triples", 200, "--output_file", tmp_path / "out" / "probe.json",
        )  # fmt: skip
        results = json.loads((tmp_path / "out" / "probe.json").read_text())["results"]
        assert list(results) == ["log-mel", *(f"untrained encoder, seed {seed}" for seed in range(3)), *models]
        assert [set(results[name]) for name in models] == [{"0", "2"}] * len(models)
        for name in models:
            row = results[name]["2"]
            assert f"| {name} | 2 | {row['phone_accuracy']:.1%} | {row['abx_error']:.1%} ± " in result.stdout


def test_run_logs_the_probe_and_resumes_exactly(tmp_path, phones):
    """And a probe changes nothing of what is trained; the script finds the same in the folder."""
    probe = ["--probe_corpus", str(phones), "--probe_clips", "8"]
    for name, options in {"plain": [], "whole": probe}.items():
        pretrain([*RUN, *options, "--output_dir", str(tmp_path / name)])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    pretrain([*RUN, *probe, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "last"])
    plain, whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "whole", "again"))
    torch.testing.assert_close(whole, plain, rtol=0, atol=0)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)

    keys = ("phone_accuracy", "abx_error")
    log = history(tmp_path / "whole")
    assert [entry["step"] for entry in log if "probe_log_mel/phone_accuracy" in entry] == [0]
    found = [[entry[f"eval_probe/{key}"] for key in keys] for entry in log if "eval_probe/abx_error" in entry]
    assert len(found) == 3  # after 2 and 4 updates, and at the end
    assert found[0] != found[1] == found[2]
    repeated = [entry for entry in history(tmp_path / "again") if "eval_probe/abx_error" in entry]
    assert [[entry[f"eval_probe/{key}"] for key in keys] for entry in repeated] == found
    assert sum("probe_log_mel/abx_error" in entry for entry in history(tmp_path / "again")) == 1
    assert "| eval_probe/phone_accuracy |" in (tmp_path / "whole" / "README.md").read_text()

    features = HiddenStates.load(str(tmp_path / "whole"), [1])
    (alone,) = PhoneProbe.load([str(phones)], ["train"], 16000, max_clips=8).measure(features)
    assert [alone[key] for key in keys] == pytest.approx(found[-1], abs=1e-6)


def test_run_in_bfloat16_logs_every_layer_asked_for_and_draws_them(tmp_path, phones, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda axis, *args, **options: drawn.append(options["label"]))
    options = ["--bf16", "--probe_corpus", str(phones), "--probe_clips", "8", "--probe_layers", "0", "2"]
    pretrain([*RUN, *options, "--objectives", "info_nce", "best_rq", "--output_dir", str(tmp_path / "run")])
    keys = set().union(*history(tmp_path / "run"))
    expected = {f"eval_probe/layer{layer}/{key}" for layer in (0, 2) for key in ("phone_accuracy", "abx_error")}
    assert {key for key in keys if key.startswith("eval_probe/")} == expected
    assert drawn == ["log-mel"] * 4


def test_best_checkpoint_by_the_probe_on_two_processes(tmp_path, phones):
    result = launch(
        "scripts/pretrain.py", *RUN, "--probe_corpus", phones, "--probe_clips", 8, "--output_dir", tmp_path / "run",
        "--load_best_model_at_end", True, "--metric_for_best_model", "probe/phone_accuracy",
    )  # fmt: skip
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    found = [entry["eval_probe/phone_accuracy"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == max(found[:2])
    assert result.stderr.count("update 0: probe_log_mel/phone_accuracy") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe_corpus", "demo"], "demo has no column 'phones' and 'phone_ends'"),
        (["--probe_corpus", "PHONES", "--probe_layers", "3"], "probe_layers must be between 0 and 2, found 3"),
        (["--probe_corpus", "PHONES", "--probe_split", "test"], "has no split 'test'"),
        (["--probe_corpus", "PHONES", "--phones_column", "words"], "has no column 'words'"),
        (["--metric_for_best_model", "probe/abx_error"], "probe/abx_error: the probe measures nothing"),
        (
            ["--probe_corpus", "PHONES", "--probe_layers", "0", "1", "--metric_for_best_model", "eval_probe/abx_error"],
            "metric_for_best_model=probe/abx_error: the probe measures probe/layer0/phone_accuracy, probe/layer0/abx",
        ),
    ],
)
def test_run_refuses_a_probe_that_cannot_be_before_it_reads_the_corpus(options, message, phones, tmp_path, monkeypatch):
    def no_corpus(*args, **kwargs):
        raise AssertionError("the corpus was read")

    monkeypatch.setattr("hf_speechcl.training.pretrain.load_train_and_validation", no_corpus)
    options = [str(phones) if text == "PHONES" else text for text in options]
    with pytest.raises(ValueError, match=message):
        pretrain([*RUN, *options, "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe_corpus", "demo", "--probe_clips", "1"], "probe_clips must be 2 at least"),
    ],
)
def test_wrong_options_of_the_probe_end_the_program(options, message, capsys):
    with pytest.raises(SystemExit):
        pretrain([*RUN, *options])
    assert message in capsys.readouterr().err


def test_lists_of_a_corpus_come_as_lists(phones):
    corpus = load_corpus(str(phones), list_columns={"phone_ends": pyarrow.float64()})
    assert corpus[0]["phone_ends"][:2] == pytest.approx([0.1, 0.2])
    assert "phones" not in corpus.column_names
    with pytest.raises(ValueError, match="list_columns: text would hide"):
        load_corpus(str(phones), list_columns={"text": pyarrow.string()})
