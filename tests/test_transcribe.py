"""Clips, recordings and files to text."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    HubertConfig,
    HubertForCTC,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC, SpeechCLModel
from hf_speechcl.__main__ import COMMANDS
from hf_speechcl.ctc import build_processor
from hf_speechcl.data.audio import AudioError, read_audio, stream_audio
from hf_speechcl.decoding import DecodingArguments, Transcript, Word
from hf_speechcl.recognizer import SpeechRecognizer
from hf_speechcl.recordings import RecordingArguments, cut_windows, find_utterances, measure_levels
from hf_speechcl.transcribe import find_recordings, main, make_cues, render

from .conftest import TINY

RATE = 16000
TEXT = "the quick brown fox jumps over a lazy dog"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
}
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
CONVOLUTIONS = {"conv_dim": (8,) * 7}


def tiny_recognizer(name: str) -> SpeechRecognizer:
    torch.manual_seed(0)
    processor = build_processor([TEXT], RATE)
    size = len(processor.tokenizer)
    features = processor.feature_extractor
    if name == "speechcl":
        model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, "vocab_size": size, "pad_token_id": 0, "sliding_window": 4}))
    elif name == "parakeet":
        encoder = {
            name: value for name, value in SMALL.items() if not name.startswith("num_conv") and name != "pad_token_id"
        }
        encoder |= {"subsampling_conv_channels": 4, "num_mel_bins": 16, "conv_kernel_size": 5, "num_key_value_heads": 2}
        model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=size, encoder_config=encoder, pad_token_id=0))
        features = ParakeetFeatureExtractor(feature_size=16)
    else:
        options = {**SMALL, **CONVOLUTIONS, "vocab_size": size}
        if name == "wav2vec2 (group)":
            features = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
        else:
            options |= LAYER_NORM
            features = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        classes = {"hubert": (HubertForCTC, HubertConfig), "wavlm": (WavLMForCTC, WavLMConfig)}
        model_class, config_class = classes.get(name, (Wav2Vec2ForCTC, Wav2Vec2Config))
        model = model_class(config_class(**options))
    return SpeechRecognizer(model, features, processor.tokenizer)


@pytest.fixture(scope="module")
def recognizer():
    return tiny_recognizer("speechcl")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, recognizer):
    folder = tmp_path_factory.mktemp("model")
    for part in (recognizer.model, recognizer.feature_extractor, recognizer.tokenizer):
        part.save_pretrained(folder)
    return folder


def write(file, samples, rate=RATE):
    soundfile.write(file, samples, rate, subtype="FLOAT")
    return str(file)


@pytest.mark.parametrize("name", ["speechcl", "wav2vec2 (layer)", "wav2vec2 (group)", "hubert", "wavlm", "parakeet"])
def test_a_clip_in_a_batch_has_the_posteriors_and_the_text_it_has_alone(name, clips):
    recognizer = tiny_recognizer(name)
    clips = [clips[0], clips[2], np.zeros(0, np.float32), clips[1]]
    batch = recognizer.log_probs(clips)
    for clip, found in zip(clips, batch):
        (alone,) = recognizer.log_probs([clip])
        assert found.shape == alone.shape
        np.testing.assert_allclose(found, alone, atol=2e-4)
    assert len(batch[2]) == 0
    seconds = len(clips[0]) / RATE
    assert len(batch[0]) * recognizer.samples_per_frame / RATE == pytest.approx(seconds, abs=0.1)
    transcripts = recognizer.transcribe(clips)
    assert transcripts[2] == Transcript("", [], None)
    assert all(word.end <= seconds + 0.1 for word in transcripts[0].words)


def test_text_of_a_clip_is_that_of_the_pipeline(recognizer, clips):
    from transformers import pipeline

    stock = pipeline(
        "automatic-speech-recognition",
        model=recognizer.model,
        feature_extractor=recognizer.feature_extractor,
        tokenizer=recognizer.tokenizer,
    )
    expected = [" ".join(stock(clip.copy())["text"].replace("[UNK]", "").split()) for clip in clips[:3]]
    assert [transcript.text for transcript in recognizer.transcribe(clips[:3])] == expected


@pytest.mark.parametrize("length", [96000, 96001, 100000, 64 * 1600 - 1])
def test_stitched_chunks_are_the_whole_with_its_last_partial_frame(recognizer, clips, length):
    whole = np.concatenate(clips)[:length]
    length, stride = recognizer._chunk(3 * 2 * recognizer._chunk(30)[1] / 2 / RATE)
    assert len(whole) > 2 * length
    blocks = np.array_split(whole, 7)
    windows = cut_windows(blocks, [(0, len(whole))], length, stride)
    with torch.inference_mode():
        found = np.concatenate(list(recognizer._stitch(windows)))
    (expected,) = recognizer.log_probs([whole])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_uncut_recording_has_the_words_of_the_whole_clip_at_any_rate_and_number_of_channels(
    recognizer, clips, tmp_path
):
    whole = np.concatenate(clips)
    chunks = RecordingArguments(pause_seconds=0, chunk_seconds=3)
    (expected,) = recognizer.transcribe([whole])
    assert recognizer.transcribe_recording(write(tmp_path / "a.wav", whole), chunks) == expected
    stereo = write(tmp_path / "b.wav", np.stack([whole, whole], 1), 44100)
    (expected,) = recognizer.transcribe([read_audio({"path": stereo}, RATE)])
    found = recognizer.transcribe_recording(stereo, chunks)
    assert found.text == expected.text
    assert [word.start for word in found.words] == [word.start for word in expected.words]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_streamed_audio_is_the_audio_read_at_once(clips, tmp_path, rate):
    audio = {"path": write(tmp_path / "a.wav", np.stack([clips[3], 0.5 * clips[3]], 1), rate)}
    blocks = list(stream_audio(audio, RATE, block_seconds=0.3))
    expected = read_audio(audio, RATE)
    streamed = np.concatenate(blocks)
    assert abs(len(streamed) - len(expected)) <= 1
    size = min(len(streamed), len(expected))
    np.testing.assert_allclose(streamed[:size], expected[:size], atol=1e-3)
    assert max(map(len, blocks)) < RATE


def test_utterances_lie_between_pauses_even_in_noise(clips):
    rng = np.random.default_rng(0)
    speech = [clip / np.abs(clip).max() for clip in clips[:4]]
    for noise in (0.0, 1e-4, 1e-2):
        parts, spans, place = [], [], 0
        for clip in speech:
            gap = int((0.9 + 0.3 * rng.random()) * RATE)
            parts += [np.zeros(gap, np.float32), clip]
            spans.append((place + gap, place + gap + len(clip)))
            place += gap + len(clip)
        samples = np.concatenate(parts) + noise * rng.normal(size=place).astype(np.float32)
        levels, num_samples = measure_levels(np.array_split(samples, 5), RATE)
        assert num_samples == place
        found = find_utterances(levels, num_samples, RATE, pause_seconds=0.6)
        assert len(found) == len(spans), noise
        for (begin, end), (first, last) in zip(found, spans):
            assert first - 0.35 * RATE <= begin <= first + 0.3 * RATE
            assert last - 0.6 * RATE <= end <= last + 0.35 * RATE
        on_frames = find_utterances(levels, num_samples, RATE, pause_seconds=0.6, grid=640)
        assert [begin // 640 * 640 for begin, _ in found] == [begin for begin, _ in on_frames]
        assert find_utterances(levels, num_samples, RATE, pause_seconds=0) == [(0, place)]
    halves = find_utterances(levels, num_samples, RATE, pause_seconds=0, max_seconds=4)
    assert [begin for begin, _ in halves[1:]] == [end for _, end in halves[:-1]]
    assert max(end - begin for begin, end in halves) <= 4 * RATE
    assert find_utterances(*measure_levels([], RATE), RATE, pause_seconds=0.5) == []


def test_clip_without_a_pause_is_read_as_it_is(clips):
    for clip in clips:
        levels, num_samples = measure_levels([clip], RATE)
        assert find_utterances(levels, num_samples, RATE, 3.0) == [(0, len(clip))]
    padded = np.concatenate([np.zeros(4 * RATE, np.float32), clips[2], np.zeros(4 * RATE, np.float32)])
    ((begin, end),) = find_utterances(*measure_levels([padded], RATE), RATE, 3.0)
    assert 3.5 * RATE < begin < 4.3 * RATE
    assert len(padded) - 4.3 * RATE < end < len(padded) - 3.5 * RATE


def test_windows_hold_no_more_than_a_chunk_of_the_recording():
    recording = (np.full(1000, block, np.float32) for block in range(500))
    utterances = [(1500, 3500), (10_000, 10_001), (20_000, 450_000)]
    windows = list(cut_windows(recording, utterances, length=6000, stride=1000))
    assert max(len(window.samples) for window in windows) <= 6000
    place = [begin for begin, _ in utterances]
    for window in windows:
        assert window.samples[window.left] == place[0] // 1000
        place[0] += window.length
        if window.is_last:
            assert place.pop(0) == utterances[len(utterances) - len(place) - 1][1]
    assert place == []


def test_words_of_utterances_have_the_times_of_the_recording(recognizer, clips, tmp_path):
    silence = np.zeros(2 * RATE, np.float32)
    file = write(tmp_path / "a.wav", np.concatenate([silence, clips[1], silence, clips[2]]))
    utterances = list(recognizer.transcribe_utterances(file))
    assert len(utterances) >= 2
    assert 1.8 <= utterances[0][0] <= 2.2
    for start, end, transcript in utterances:
        assert all(start <= word.start < word.end <= end + 0.05 for word in transcript.words)


def test_speech_to_text_models_are_heard_through_the_pipeline(clips, tmp_path):
    tokenizer = build_processor([TEXT], RATE).tokenizer
    config = MoonshineConfig(
        hidden_size=16,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        vocab_size=len(tokenizer),
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MoonshineForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    for part in (model, Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer):
        part.save_pretrained(tmp_path)
    recognizer = SpeechRecognizer.from_pretrained(tmp_path)
    assert recognizer.kind == "seq2seq"
    transcripts = recognizer.transcribe([clips[2], np.zeros(0, np.float32)])
    assert transcripts[0].text
    assert transcripts[0].words is None
    assert transcripts[1].text == ""
    file = write(tmp_path / "a.wav", np.concatenate([clips[2], np.zeros(2 * RATE, np.float32), clips[3]]))
    utterances = list(recognizer.transcribe_utterances(file, RecordingArguments(chunk_seconds=3)))
    assert len(utterances) >= 2
    assert all(end - start <= 3 for start, end, _ in utterances)
    with pytest.raises(ValueError, match="has no CTC head: beam_width"):
        SpeechRecognizer.from_pretrained(tmp_path, decoding=DecodingArguments(beam_width=5))


def test_a_model_of_another_rate_is_refused(recognizer):
    with pytest.raises(ValueError, match="for 8000 Hz and the model for 16000 Hz"):
        SpeechRecognizer(recognizer.model, Wav2Vec2FeatureExtractor(sampling_rate=8000), recognizer.tokenizer)


def test_a_model_that_writes_no_text_is_refused(tmp_path, config):
    SpeechCLModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds SpeechCLModel, which writes no text: fine-tune it"):
        SpeechRecognizer.from_pretrained(tmp_path)


def test_chunks_shorter_than_what_surrounds_them_are_refused(recognizer):
    with pytest.raises(ValueError, match=r"chunk_seconds 0.5: chunks of this model overlap by .* set it to"):
        recognizer.transcribe_recording("unread.wav", RecordingArguments(chunk_seconds=0.5))


def words(*spans):
    return [Word(text, start, end, 0.9) for text, start, end in spans]


def test_subtitles_end_at_pauses_at_two_lines_and_after_six_seconds():
    long = [(f"word{number:02}", number * 0.3, number * 0.3 + 0.2) for number in range(40)]
    utterances = [
        (0.0, 12.0, Transcript("", words(*long), 0.9)),
        (13.0, 15.0, Transcript("", words(("a", 13.1, 13.2), ("b", 14.9, 15.0)), 0.9)),
        (20.0, 21.0, Transcript("from a model without times", None, None)),
    ]
    cues = make_cues(utterances)
    assert " ".join(cue.text.replace("\n", " ") for cue in cues) == (
        " ".join(text for text, *_ in long) + " a b from a model without times"
    )
    for cue, following in zip(cues, cues[1:]):
        assert cue.start < cue.end <= following.start
    assert max(cue.end - cue.start for cue in cues) <= 6.4
    assert all(len(line) <= 42 for cue in cues for line in cue.text.split("\n"))
    assert max(cue.text.count("\n") for cue in cues) == 1


def test_formats_are_valid():
    utterances = [
        (3599.5, 3602.0, Transcript("a <b> & c", words(("a", 3599.9996, 3600.2), ("<b> & c", 3601, 3601.5)), 0.9))
    ]
    assert render("x.wav", utterances, "text") == "a <b> & c\n"
    assert render("x.wav", utterances, "srt") == (
        "1\n01:00:00,000 --> 01:00:00,600\na\n\n2\n01:00:01,000 --> 01:00:01,900\n<b> & c\n"
    )
    assert render("x.wav", utterances, "vtt") == (
        "WEBVTT\n\n01:00:00.000 --> 01:00:00.600\na\n\n01:00:01.000 --> 01:00:01.900\n&lt;b&gt; &amp; c\n"
    )
    parsed = json.loads(render("x.wav", utterances, "json"))
    assert parsed["file"] == "x.wav"
    assert parsed["words"][1] == {"text": "<b> & c", "start": 3601, "end": 3601.5, "confidence": 0.9}
    assert parsed["utterances"] == [{"start": 3599.5, "end": 3602.0, "text": "a <b> & c"}]


def test_transcribe_names_bad_files_goes_on_and_says_so(
    model_folder, recognizer, audio_folder, tmp_path, caplog, capsys
):
    (audio_folder / "sub").mkdir()
    (audio_folder / "sub" / "bad.wav").write_bytes((audio_folder / "clip0.wav").read_bytes()[:3000])
    options = ["--device", "cpu", "--pause_seconds", "0"]
    with pytest.raises(SystemExit, match="1 of 5 files could not be transcribed"):
        main([str(model_folder), str(audio_folder), *options, "--format", "srt", "--output_dir", str(tmp_path / "out")])
    assert "skipped sub/bad.wav: truncated" in caplog.text
    written = sorted(file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.srt"))
    assert written == [f"clip{number}.srt" for number in range(4)]
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n\w", (tmp_path / "out" / "clip1.srt").read_text())
    main([str(model_folder), str(audio_folder / "clip2.wav"), *options])
    clip = read_audio({"path": str(audio_folder / "clip2.wav")}, RATE)
    assert capsys.readouterr().out == recognizer.transcribe([clip])[0].text + "\n"


def test_transcribe_stops_in_the_first_second_at_wrong_options(audio_folder, capsys):
    clip = str(audio_folder / "clip0.wav")
    with pytest.raises(SystemExit):
        main(["model"])
    assert "expected MODEL FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["model", clip, "--format", "doc"])
    assert "format must be one of text, json, srt, vtt, found 'doc'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no file or folder missing.wav"):
        main(["model", "missing.wav"])
    with pytest.raises(SystemExit, match="4 files: --format srt needs --output_dir"):
        main(["model", str(audio_folder), "--format", "srt"])
    other = audio_folder / "sub"
    other.mkdir()
    write(other / "clip0.wav", np.zeros(100))
    with pytest.raises(SystemExit, match="clip0.wav: two files of this name"):
        main(["model", clip, str(other)])
    assert list(find_recordings([clip, clip])) == ["clip0.wav"]


def test_unreadable_recordings_are_errors_with_a_reason(recognizer, tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(AudioError, match="not readable as audio"):
        recognizer.transcribe_recording(tmp_path / "a.wav")


def test_every_command_has_a_main():
    from importlib import import_module

    for module, _ in COMMANDS.values():
        assert callable(import_module(f"hf_speechcl.{module}").main)
