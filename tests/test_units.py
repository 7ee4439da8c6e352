"""HuBERT's units: what is clustered, the store, which clips they belong to, and two iterations of the road."""

import json

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.numpy import save_file
from transformers import (
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from hf_speechcl import SpeechCLConfig, SpeechCLForPreTraining, SpeechCLModel, SpeechDataset, load_corpus
from hf_speechcl.data import PretrainingCollator
from hf_speechcl.data.audio import to_float32
from hf_speechcl.data.units import Units, units_table
from hf_speechcl.features import HiddenStates
from hf_speechcl.objectives.hubert import HuBERT, unit_logits
from hf_speechcl.training import make_units, pretrain
from hf_speechcl.training.unit_features import MFCC, EncoderLayer
from tests import reference
from tests.conftest import FAST_RUN, TINY, TINY_OPTIONS, units_of


def make(output_dir, *options):
    make_units.main(["--output_dir", str(output_dir), "--device", "cpu", "--num_units", "20", *map(str, options)])
    return Units.load(output_dir)


def train(output_dir, *options):
    pretrain.main(
        ["--objectives", "hubert", "--output_dir", str(output_dir), "--max_steps", "2", *FAST_RUN, *map(str, options)]
    )


@pytest.fixture(scope="module")
def units1(tmp_path_factory):
    """Units of MFCCs of the embedded corpus."""
    return make(tmp_path_factory.mktemp("units") / "first")


@pytest.fixture(scope="module")
def encoder1(units1, tmp_path_factory):
    """The folder of an encoder trained for two updates to predict them."""
    folder = tmp_path_factory.mktemp("encoders") / "first"
    train(folder, "--units", units1.folder, "--encoder_options", *TINY_OPTIONS)
    return folder


# ---- the objective ----


@pytest.mark.parametrize("frames", [1, 13])
def test_loss_equals_reference(frames):
    predictions, embeddings, units = torch.randn(frames, 6), torch.randn(9, 6), torch.randint(9, (frames,))
    loss = torch.nn.functional.cross_entropy(unit_logits(predictions, embeddings, 0.1), units, reduction="sum")
    assert loss.item() == pytest.approx(reference.unit_loss(predictions, embeddings, units, 0.1), rel=1e-5)


def test_objective_predicts_the_units_of_masked_frames(clips):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives={"hubert": {"num_units": 10}})).eval()
    collator = PretrainingCollator(model._get_feat_extract_output_lengths, units=units_of)
    batch = collator([{"index": n, "seed": (0, 0, n), "input_values": clip} for n, clip in enumerate(clips)])
    mask, units = batch["mask_time_indices"], batch["units"]
    assert units.dtype == torch.int64
    for row, clip in zip(units, clips):
        length = model._get_feat_extract_output_lengths(len(clip))
        assert (row[:length] >= 0).all()
        assert (row[length:] == -100).all()
    batch.pop("num_skipped")
    output = model(**batch).objectives["hubert"]
    objective = model.objectives["hubert"]
    states = model.speechcl(
        batch["input_values"], attention_mask=batch["attention_mask"], mask_time_indices=mask
    ).last_hidden_state
    predictions = objective.project(states[mask])
    expected = reference.unit_loss(predictions, objective.embeddings.weight, units[mask], 0.1)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.metrics["codes"].tolist() == [torch.bincount(units[mask], minlength=10).tolist()]
    scalars = objective.summarize(output.metrics, output.num_items.item())
    assert 0 <= scalars["accuracy"] <= 1
    assert 1 < scalars["code_perplexity"] <= 10


def test_every_parameter_has_a_gradient_if_nothing_is_masked(clips):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives={"hubert": {"num_units": 10}}))
    collator = PretrainingCollator(model._get_feat_extract_output_lengths, mask_prob=0, units=units_of)
    batch = collator([{"index": 0, "seed": (0, 0, 0), "input_values": clips[0]}])
    batch.pop("num_skipped")
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.objectives.parameters())


def test_units_of_another_rate_than_the_encoder_are_refused():
    with pytest.raises(ValueError, match="a frame each 320 samples, the units are one each 640"):
        HuBERT(SpeechCLConfig(**TINY, subsampling_factor=2))


# ---- what is clustered ----


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_mfccs_are_as_many_as_the_encoder_has_frames(rate, factor):
    config = SpeechCLConfig(
        **TINY, sampling_rate=rate, hop_length=rate // 100, frame_length=rate // 40, subsampling_factor=factor
    )
    features, encoder = MFCC(rate, config.inputs_to_logits_ratio), SpeechCLModel(config)
    for samples in (1, 159, 160, 161, 639, 640, 641, 5119, 5120, 8001):
        frames = features(torch.randn(samples))
        assert frames.shape == (encoder._get_feat_extract_output_lengths(samples), 39)
        assert np.isfinite(frames).all()


def test_mfccs_tell_slope_from_level():
    """A louder copy differs in the first cepstrum alone; a sound that repeats each 10 ms has no slopes."""
    sound = torch.randn(160).repeat(100)
    features = MFCC()
    quiet, loud = features(0.1 * sound)[2:-2], features(0.2 * sound)[2:-2]
    np.testing.assert_allclose(quiet[:, 13:], 0, atol=1e-3)
    np.testing.assert_allclose(loud[:, 0] - quiet[:, 0], np.log(4) * np.sqrt(23), rtol=1e-3)
    np.testing.assert_allclose(loud[:, 1:], quiet[:, 1:], atol=1e-2)


def test_layers_of_an_encoder_without_padding_at_its_ends_are_filled_up(tmp_path, clips):
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    features = EncoderLayer(str(tmp_path), 1)
    assert (features.samples_per_unit, features.sampling_rate) == (320, 16000)
    for samples in (400, 3200, 3201, 3280):
        assert features(torch.randn(samples)).shape == (-(-samples // 320), 16)
    clip = torch.from_numpy(clips[0])
    np.testing.assert_allclose(features(clip * 0.3 + 0.01), features(clip), atol=1e-4)


# ---- making and keeping them ----


def test_store_holds_units_and_nothing_pickled(units1):
    assert {path.name for path in units1.folder.iterdir()} == {"kmeans.safetensors", "units.json", "units.parquet"}
    assert units1.centroids.shape == (20, 39)
    assert units1.centroids.dtype == np.float32
    description = json.loads((units1.folder / "units.json").read_text())
    assert description["statistics"]["train"]["units_in_use"] == 20
    assert 1 < description["statistics"]["validation"]["perplexity"] <= 20


def test_units_are_the_nearest_centroids(units1, corpus):
    dataset = SpeechDataset(corpus, 16000, max_seconds=15.0, min_seconds=0.4)
    clips = units1.of_clips(dataset, "validation")
    frames = MFCC()(torch.from_numpy(to_float32(dataset[0, 3]["input_values"])))
    distances = ((frames[:, None] - units1.centroids) ** 2).sum(-1)
    assert clips[3].tolist() == distances.argmin(-1).tolist()


def test_making_them_again_gives_the_same(audio_folder, tmp_path, caplog):
    first, second = (make(tmp_path / name, "--corpus", audio_folder) for name in ("first", "second"))
    assert second.description == first.description
    assert second.table.equals(first.table)
    with caplog.at_level("INFO", "hf_speechcl"):
        make(tmp_path / "first", "--corpus", audio_folder)
    assert "holds these units already" in caplog.text


def test_folder_of_something_else_is_refused(units1, tmp_path):
    with pytest.raises(FileExistsError, match="holds units made with seed=0, now 1: delete it or give another"):
        make(units1.folder, "--seed", 1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files but no complete units"):
        make(tmp_path)


def test_centroids_of_another_making_are_refused(units1, tmp_path):
    for path in units1.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Units.load(tmp_path).description == units1.description
    save_file({"centroids": units1.centroids + 1}, tmp_path / "kmeans.safetensors")
    with pytest.raises(ValueError, match="are not of one making"):
        Units.load(tmp_path)


@pytest.fixture
def odd_folder(tmp_path, clips):
    """Long and short recordings of several rates and odd lengths, two of them useless, in two splits."""
    folder = tmp_path / "odd"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    long = np.concatenate(clips * 2)
    soundfile.write(folder / "train" / "long.wav", long, 16000)
    soundfile.write(folder / "train" / "eight.wav", soxr.resample(long[:90001], 16000, 8000), 8000)
    soundfile.write(folder / "train" / "odd.flac", soxr.resample(clips[3][:-7], 16000, 44100), 44100)
    soundfile.write(folder / "train" / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "train" / "short.wav", clips[0][:1000], 16000)
    soundfile.write(folder / "validation" / "eleven.wav", soxr.resample(clips[4], 16000, 11025), 11025)
    return folder


def test_there_is_a_unit_for_each_frame_of_each_part(odd_folder, tmp_path):
    units = make(tmp_path / "units", "--corpus", odd_folder, "--max_seconds", 2.3)
    frame_length = SpeechCLModel(SpeechCLConfig(**TINY))._get_feat_extract_output_lengths
    for split in ("train", "validation"):
        dataset = SpeechDataset(load_corpus(str(odd_folder), split), 16000, max_seconds=2.3, min_seconds=0.4)
        clips = units.of_clips(dataset, split)
        assert len(clips) == len(dataset) > 1
        assert any(dataset.starts > 0)
        for index in range(len(dataset)):
            samples = dataset[0, index]["input_values"]
            if samples is None:
                assert dataset.corpus[int(dataset.rows[index])]["id"] == "train/silent.wav"
                assert len(clips[index]) == 0
            else:
                assert len(clips(index, frame_length(len(samples)))) == frame_length(len(samples))


def test_centroids_are_fitted_on_train_alone(odd_folder, tmp_path, clips):
    first = make(tmp_path / "first", "--corpus", odd_folder)
    soundfile.write(odd_folder / "validation" / "more.wav", clips[2], 16000)
    second = make(tmp_path / "second", "--corpus", odd_folder)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert first.table.num_rows < second.table.num_rows
    soundfile.write(odd_folder / "train" / "more.wav", clips[2], 16000)
    third = make(tmp_path / "third", "--corpus", odd_folder)
    assert third.description["units_hash"] != first.description["units_hash"] == second.description["units_hash"]


def test_centroids_are_fitted_step_by_step_on_fit_hours_at_most(monkeypatch):
    seen = []
    monkeypatch.setattr(
        make_units.MiniBatchKMeans,
        "partial_fit",
        lambda self, frames, fit=make_units.MiniBatchKMeans.partial_fit: seen.append(len(frames)) or fit(self, frames),
    )
    monkeypatch.setattr(make_units, "FRAMES_PER_STEP", 500)
    dataset = SpeechDataset(load_corpus("demo"), 16000, max_seconds=15, min_seconds=0.4)
    options = make_units.UnitArguments(num_units=20, fit_hours=0.03)
    assert make_units.fit_centroids(MFCC(), dataset, options).shape == (20, 39)
    assert 0.03 * 3600 * 25 <= sum(seen) < 0.03 * 3600 * 25 + 15 * 25
    assert len(seen) > 4
    assert max(seen) < 500 + 15 * 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_units", "1"], "num_units must be at least 2, found 1"),
        (["--layer", "2"], "give it with --features ENCODER, and only then"),
        (["--features", "tiny"], "give it with --features ENCODER, and only then"),
        (["--features", "tiny", "--layer", "1"], "features 'tiny': expected mfcc, starter, a folder or a Hub name"),
        (["--features", "starter", "--layer", "1", "--device", "gpu"], "device: 'gpu' cannot be used"),
        (["--samples_per_unit", "500"], "multiple of 10 ms, 160 samples at 16000 Hz, found 500"),
        (["--max_seconds", "0"], "max_seconds must be positive"),
        (["--fit_hours", "0"], "fit_hours must be positive"),
        (["--corpus", "/no/such"], "no folder or file /no/such"),
    ],
)
def test_wrong_option_is_refused(options, message, tmp_path, capsys):
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        make(tmp_path / "units", *options)
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "units").exists()


def test_encoder_without_such_a_layer_or_rate_is_refused(encoder1, tmp_path):
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer must be between 0 and 2, found {layer}"):
            make(tmp_path / "units", "--features", encoder1, "--layer", layer)
    with pytest.raises(ValueError, match="samples_per_unit=320, but .* has 640: leave it out"):
        make(tmp_path / "units", "--features", encoder1, "--layer", 1, "--samples_per_unit", 320)


def test_encoders_of_other_inputs_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="wav2vec2-bert does not encode waveforms alone"):
        HiddenStates.load(str(tmp_path))


def test_too_few_frames_for_the_units_are_refused(audio_folder, tmp_path):
    with pytest.raises(ValueError, match=r"train has \d+ frames, too few for num_units=3000"):
        make(tmp_path / "units", "--corpus", audio_folder, "--num_units", 3000)


# ---- which clips they belong to ----


def make_store(names, folder="units", split="train"):
    description = {"sampling_rate": 16000, "samples_per_unit": 640, "num_units": 5, "units_hash": "x"}
    rows = [(split, (id, start), np.full(count, unit)) for id, start, count, unit in names]
    return Units(folder, description, np.zeros((5, 2), np.float32), units_table(rows))


def test_clips_of_two_sources_with_the_same_name_are_told_apart_by_their_order(corpus):
    rows = corpus.select([4, 5]).remove_columns("id").add_column("id", ["a.wav", "a.wav"])
    counts = [round(25 * seconds) for seconds in rows["duration"]]
    store = make_store([("a.wav", 0.0, counts[0], 1), ("a.wav", 0.0, counts[1], 2)])
    clips = store.of_clips(SpeechDataset(rows, 16000), "train")
    assert [clips[0][0], clips[1][0]] == [1, 2]


def test_missing_clips_other_parts_and_other_rates_are_refused(units1, corpus):
    with pytest.raises(ValueError, match=r"60 clips of train, 60 do not have theirs: .* has none; .*; …\. .*"):
        units1.of_clips(SpeechDataset(corpus, 16000, min_seconds=0.4), "train")
    with pytest.raises(ValueError, match="max_seconds=15.0, min_seconds=0.4: give the same options, or delete it"):
        units1.of_clips(SpeechDataset(corpus, 16000, max_seconds=2, min_seconds=0.4), "validation")
    with pytest.raises(ValueError, match="is of audio at 16000 Hz, the encoder takes 8000 Hz"):
        units1.of_clips(SpeechDataset(corpus, 8000, min_seconds=0.4), "validation")
    name, seconds = corpus[0]["id"], corpus[0]["duration"]
    store = make_store([(name, 0.0, round(50 * seconds), 1)])
    with pytest.raises(ValueError, match=f"{name} has {round(50 * seconds)}, expected about {25 * seconds:.0f}"):
        store.of_clips(SpeechDataset(corpus.select([0]), 16000), "train")


def test_batch_with_a_unit_too_few_is_refused_by_name(corpus):
    dataset = SpeechDataset(corpus.select([0]), 16000)
    name, length = corpus[0]["id"], -(-len(dataset[0, 0]["input_values"]) // 640)
    clips = make_store([(name, 0.0, length - 1, 1)]).of_clips(dataset, "train")
    collator = PretrainingCollator(lambda samples: -(-samples // 640), units=clips)
    with pytest.raises(
        ValueError, match=f"{name}, from 0 s on, has {length - 1} units, expected {length}, one a frame"
    ):
        collator([dataset[0, 0]])


def test_batch_of_clips_that_cannot_be_decoded_has_units_for_its_silence():
    collator = PretrainingCollator(lambda samples: -(-samples // 640), units=units_of)
    batch = collator([{"index": 0, "seed": (0, 0, 0), "input_values": None}])
    assert batch["units"].tolist() == [[-100] * 3]


# ---- the road ----


def test_model_remembers_its_units(encoder1, units1):
    options = json.loads((encoder1 / "config.json").read_text())["objectives"]["hubert"]
    assert options == {
        "weight": 1.0, "num_units": 20, "samples_per_unit": 640, "units_hash": units1.description["units_hash"],
    }  # fmt: skip
    history = json.loads((encoder1 / "trainer_state.json").read_text())["log_history"]
    assert set().union(*history) >= {"hubert/loss", "hubert/accuracy", "hubert/code_perplexity", "eval_hubert/loss"}


def test_second_iteration_from_a_layer_of_the_first(encoder1, tmp_path):
    second = make(tmp_path / "units", "--features", encoder1, "--layer", 1, "--fit_hours", 0.05)
    assert second.centroids.shape == (20, 32)
    train(tmp_path / "encoder", "--units", second.folder, "--encoder_options", *TINY_OPTIONS)
    config = SpeechCLConfig.from_pretrained(tmp_path / "encoder")
    assert config.objectives["hubert"]["units_hash"] == second.description["units_hash"]
    with pytest.raises(ValueError, match=r"mismatched units: .*first has units_hash='\w+', but .*units has '\w+'"):
        train(tmp_path / "more", "--units", second.folder, "--encoder", encoder1)


def test_run_is_not_resumed_with_other_units(audio_folder, tmp_path):
    first, other = (make(tmp_path / f"units{n}", "--corpus", audio_folder, "--seed", n) for n in range(2))
    options = [
        "--corpus",
        audio_folder,
        "--encoder_options",
        *TINY_OPTIONS,
        "--save_strategy",
        "steps",
        "--save_steps",
        1,
    ]
    train(tmp_path / "run", "--units", first.folder, *options)
    with pytest.raises(ValueError, match=r"mismatched units: .*checkpoint-2 has units_hash="):
        train(tmp_path / "run", "--units", other.folder, *options, "--resume_from_checkpoint", "last", "--max_steps", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the objective hubert needs units: make them with `python scripts/make_units.py --corpus CORPUS"),
        (["--units", "/no/such"], "no units in /no/such: make them with scripts/make_units.py --output_dir /no/such"),
        (["--units", "FIRST", "--objectives", "best_rq"], "units are for the objective hubert: add it"),
        (
            ["--units", "FIRST", "--objective_options", "hubert.num_units=50"],
            "objective_options has num_units=50, but FIRST has 20: leave the option out",
        ),
        (["--units", "FIRST", "--encoder_options", "subsampling_factor=2"], "a frame each 320 samples"),
        (["--units", "FIRST", "--max_seconds", "1"], "do not have theirs"),
    ],
)
def test_units_that_do_not_fit_the_run_are_refused(options, message, units1, tmp_path):
    first = str(units1.folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(tmp_path / "run", *[option.replace("FIRST", first) for option in options])
    assert message.replace("FIRST", first) in str(error.value)
