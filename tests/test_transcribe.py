"""Clips, recordings and files to text."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
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
from hf_speechcl.int8 import Int8Linear, quantize_linear
from hf_speechcl.recognizer import DTYPES, ComputingArguments, SpeechRecognizer, check_dtype
from hf_speechcl.recordings import (
    RecordingArguments,
    batch_by_length,
    cut_windows,
    find_utterances,
    group_windows,
    measure_levels,
)
from hf_speechcl.transcribe import find_recordings, main, make_cues, render

from .conftest import ROOT, TINY

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
        classes = {
            "hubert": (HubertForCTC, HubertConfig),
            "wavlm": (WavLMForCTC, WavLMConfig),
            "conformer": (Wav2Vec2ConformerForCTC, Wav2Vec2ConformerConfig),
        }
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


@pytest.mark.parametrize(
    "name", ["speechcl", "wav2vec2 (layer)", "wav2vec2 (group)", "hubert", "wavlm", "parakeet", "conformer"]
)
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
    mono = write(tmp_path / "a.wav", whole)
    stereo = write(tmp_path / "b.wav", np.stack([whole, whole], 1), 44100)
    for file in (mono, stereo):
        (expected,) = recognizer.transcribe([read_audio({"path": file}, RATE)])
        found = recognizer.transcribe_recording(file, chunks)
        assert found.text == expected.text
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-3)
        for word, other in zip(found.words, expected.words, strict=True):
            assert (word.text, word.start, word.end) == (other.text, other.start, other.end)
            assert word.confidence == pytest.approx(other.confidence, rel=1e-3)


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


def pauses_between(clips, tmp_path):
    silence = np.zeros(RATE, np.float32)
    return write(tmp_path / "pauses.wav", np.concatenate([part for clip in clips for part in (clip, silence)]))


@pytest.mark.parametrize("name", ["speechcl", "wav2vec2 (layer)"])
def test_utterances_read_together_have_the_transcripts_they_have_alone(name, clips, tmp_path, monkeypatch):
    recognizer, file = tiny_recognizer(name), pauses_between([*clips, clips[0]], tmp_path)
    calls = []
    forward = recognizer.model.forward
    monkeypatch.setattr(
        recognizer.model, "forward", lambda **inputs: calls.append(inputs["input_values"].shape) or forward(**inputs)
    )
    together = list(recognizer.transcribe_utterances(file))
    num_calls = len(calls)
    monkeypatch.setattr("hf_speechcl.recognizer.BATCH_SECONDS", 0.0)
    alone = list(recognizer.transcribe_utterances(file))
    assert num_calls < len(calls) - num_calls == len(alone)
    assert max(rows * samples for rows, samples in calls) <= 15 * RATE
    for (*times, left), (*expected, right) in zip(together, alone, strict=True):
        assert times == expected
        assert left.text == right.text
        assert [word.start for word in left.words] == [word.start for word in right.words]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_batches_hold_every_window_once_and_with_padding_no_more_than_they_may(lengths, limit):
    batches = batch_by_length(lengths, limit)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= limit


def test_groups_hold_all_windows_in_their_order_and_no_more_of_the_recording_than_is_needed():
    read = []
    blocks = (read.append(block) or np.full(1000, block, np.float32) for block in range(100))
    groups = group_windows(cut_windows(blocks, [(0, 30_500), (40_000, 100_000)], 6000, 1000), 12_000)
    first = next(groups)
    assert [window.samples[window.left] for window in first] == [0, 4, 8]
    assert len(read) < 20
    assert sum(window.length for group in [first, *groups] for window in group) == 90_500


def test_clips_without_padding_have_no_attention_mask(recognizer, clips, monkeypatch):
    masked = []
    forward = recognizer.model.forward
    monkeypatch.setattr(
        recognizer.model, "forward", lambda **inputs: masked.append("attention_mask" in inputs) or forward(**inputs)
    )
    recognizer.log_probs([clips[0]])
    recognizer.log_probs([clips[0], clips[0][::-1].copy()])
    recognizer.log_probs(clips[:2])
    assert masked == [False, False, True]


# Precision


def int8_linear(inputs, linear):
    """An 8-bit linear layer number by number."""
    outputs = torch.zeros(len(inputs), linear.out_features)
    for row, values in enumerate(inputs):
        step = values.abs().max() / 127
        for column, weights in enumerate(linear.weight):
            size = weights.abs().max() / 127
            product = sum((values / step).round() * (weights / size).round())
            outputs[row, column] = product * step * size + linear.bias[column]
    return outputs


@torch.no_grad()
def test_int8_layer_is_the_rounded_product_and_a_loud_frame_leaves_the_others_alone():
    linear, inputs = nn.Linear(64, 8), torch.randn(2, 3, 64)
    layer = Int8Linear(linear)
    outputs = layer(inputs)
    torch.testing.assert_close(outputs.flatten(0, 1), int8_linear(inputs.flatten(0, 1), linear), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs, linear(inputs), rtol=0, atol=0.03)
    loud = torch.cat([inputs, 1000 * inputs[:1]])
    assert torch.equal(layer(loud)[:2], outputs)
    assert torch.equal(layer(torch.zeros(1, 64)), linear.bias[None])


def test_int8_stands_for_every_linear_layer_but_small_ones():
    model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 30}))
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    quantize_linear(model)
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert len(layers) == 2 * 6
    assert {layer.integers.dtype for layer in layers} == {torch.int8}
    assert sum(layer.integers.numel() for layer in layers) > 0.9 * weights
    assert type(model.lm_head) is nn.Linear


def test_int8_is_refused_where_its_products_overflow(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.int() @ right.int()).clamp(-32768, 32767))
    with pytest.raises(ValueError, match="dtype int8: the products of this processor overflow; use float32"):
        quantize_linear(nn.Linear(64, 64))


@pytest.mark.parametrize("name", ["speechcl", "wav2vec2", "wavlm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_posteriors_of_other_dtypes_are_near_those_of_float32(name, dtype, clips, tmp_path):
    torch.manual_seed(0)
    processor = build_processor([TEXT], RATE)
    options = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(processor.tokenizer), "pad_token_id": 0}
    if name == "speechcl":
        model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, **options}))
    else:
        model_class, config = (Wav2Vec2ForCTC, Wav2Vec2Config) if name == "wav2vec2" else (WavLMForCTC, WavLMConfig)
        model = model_class(config(**{**SMALL, **CONVOLUTIONS, **LAYER_NORM, **options}))
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    recognizer = SpeechRecognizer.from_pretrained(tmp_path, dtype=dtype)
    layers = {type(layer) for layer in recognizer.model.modules()}
    assert (recognizer.model.dtype, Int8Linear in layers) == (
        (torch.bfloat16, False) if dtype == "bfloat16" else (torch.float32, True)
    )
    expected = SpeechRecognizer.from_pretrained(tmp_path).log_probs(clips[:3])
    for found, reference in zip(recognizer.log_probs(clips[:3]), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference, atol=0.1)
        assert np.abs(found - reference).max() > 0


def test_unknown_precision_and_int8_on_an_accelerator_are_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, found 'float16'"):
        ComputingArguments(device="cpu", dtype="float16")
    with pytest.raises(
        ValueError, match="dtype int8 is for the cpu, found device cuda:1: use bfloat16, or the device cpu"
    ):
        check_dtype("int8", torch.device("cuda:1"))
    for dtype in DTYPES:
        assert ComputingArguments(device="cpu", dtype=dtype).torch_device == torch.device("cpu")


def test_benchmark_measures_every_model_in_every_way_and_refuses_what_it_does_not_know(capsys):
    spec = spec_from_file_location("benchmark", ROOT / "scripts" / "benchmarks" / "transcribe.py")
    benchmark = module_from_spec(spec)
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
    for dtype in ("bfloat16", "int8"):
        assert SpeechRecognizer.from_pretrained(tmp_path, dtype=dtype).transcribe([clips[2]])[0].text
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
    with pytest.raises(SystemExit):
        main(["model", clip, "--dtype", "int4"])
    assert "dtype must be one of float32, bfloat16, int8, found 'int4'" in capsys.readouterr().err
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
