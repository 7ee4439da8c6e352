"""Clips, recordings and files to text."""

import io
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from hf_speechcl import SpeechCLModel
from hf_speechcl.__main__ import COMMANDS
from hf_speechcl.__main__ import main as run_command
from hf_speechcl.ctc import build_processor
from hf_speechcl.data.audio import AudioError, read_audio
from hf_speechcl.decoding import DecodingArguments, Transcript, Word
from hf_speechcl.recognizer import SpeechRecognizer, find_device
from hf_speechcl.recordings import (
    RecordingArguments,
    cut_windows,
)
from hf_speechcl.transcribe import find_recordings, main, make_cues, render
from tests.recognizers import CONVOLUTIONS, LAYER_NORM, RATE, SMALL, TEXT, tiny_recognizer, write


@pytest.fixture(scope="module")
def recognizer():
    return tiny_recognizer("speechcl")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, recognizer):
    folder = tmp_path_factory.mktemp("model")
    for part in (recognizer.model, recognizer.feature_extractor, recognizer.tokenizer):
        part.save_pretrained(folder)
    return folder


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


def test_frames_of_an_adapter_are_longer(clips):
    torch.manual_seed(0)
    processor = build_processor([TEXT], RATE)
    options = {**SMALL, **CONVOLUTIONS, **LAYER_NORM, "vocab_size": len(processor.tokenizer), "add_adapter": True}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**options))
    features = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    recognizer = SpeechRecognizer(model, features, processor.tokenizer)
    assert recognizer.samples_per_frame == 320 * 8
    whole = np.concatenate(clips)
    (found,) = recognizer.log_probs([whole])
    assert len(found) == pytest.approx(len(whole) / recognizer.samples_per_frame, abs=2)


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
    length, stride = recognizer.chunk(3 * 2 * recognizer.chunk(30)[1] / 2 / RATE)
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
    assert recognizer.transcribe([clips[2][:100]])[0].words is None  # shorter than its convolutions
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
    whisper = SimpleNamespace(kind="seq2seq", sampling_rate=16000)
    with pytest.raises(ValueError, match="chunk_seconds must be 1 or more, found 0.02"):
        SpeechRecognizer.chunk(whisper, 0.02)


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
    os.link(audio_folder / "clip0.wav", os.fsencode(audio_folder) + b"/caf\xe9.wav")
    soundfile.write(audio_folder / "nothing.wav", [], RATE)
    (audio_folder / "call.m4a").write_bytes(b"x")
    options = ["--device", "cpu", "--pause_seconds", "0"]
    with pytest.raises(SystemExit, match="3 of 7 files could not be transcribed"):
        main([str(model_folder), str(audio_folder), *options, "--format", "srt", "--output_dir", str(tmp_path / "out")])
    assert "skipped sub/bad.wav: truncated" in caplog.text
    assert r"skipped 'caf\udce9.wav': its name is not UTF-8" in caplog.text
    assert "skipped nothing.wav: it holds no samples" in caplog.text
    assert "skipped 1 × .m4a of audio: convert them" in caplog.text
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_of_seconds(model_folder, audio_folder, monkeypatch):
    for name, size in {"COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, size)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    main([str(model_folder), str(audio_folder / "clip2.wav"), "--device", "cpu"])
    seconds = soundfile.info(audio_folder / "clip2.wav").duration
    assert f"{seconds:.0f}/{seconds:.0f} s" in terminal.getvalue()


def test_a_wrong_chunk_and_a_file_for_a_folder_stop_before_any_recording_is_read(model_folder, audio_folder):
    clip = str(audio_folder / "clip0.wav")
    with pytest.raises(SystemExit, match="error: chunk_seconds 0.1: chunks of this model overlap"):
        main([str(model_folder), clip, "--chunk_seconds", "0.1"])
    with pytest.raises(SystemExit, match="error: .*File exists.*clip1.wav"):
        main(["model", clip, "--output_dir", str(audio_folder / "clip1.wav")])


def test_a_word_longer_than_a_cue_is_divided():
    cues = make_cues([(0.0, 40.0, Transcript("", words(("語" * 200, 0.0, 40.0)), 0.9))])
    assert "".join(cue.text.replace("\n", "") for cue in cues) == "語" * 200
    assert all(cue.end - cue.start <= 6.5 for cue in cues)
    assert max(cue.text.count("\n") for cue in cues) <= 1
    (cue,) = make_cues([(0.0, 7.0, Transcript("", words(("hello", 0.0, 7.0)), 0.9))])
    assert cue.text == "hello"


def test_unreadable_recordings_are_errors_with_a_reason(recognizer, tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(AudioError, match="not readable as audio"):
        recognizer.transcribe_recording(tmp_path / "a.wav")


def test_every_command_has_a_main():
    from importlib import import_module

    for module, _ in COMMANDS.values():
        assert callable(import_module(f"hf_speechcl.{module}").main)


def test_commands_of_the_package_are_listed_and_take_their_options(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf_speechcl"])
    run_command()
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    monkeypatch.setattr("sys.argv", ["hf_speechcl", "build-lm", "--order", "9", "--corpus", "demo"])
    with pytest.raises(SystemExit):
        run_command()
    assert "order must be 2 to 6, found 9" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["hf_speechcl", "trancribe"])
    with pytest.raises(SystemExit, match="error: no command 'trancribe'"):
        run_command()


def test_a_build_for_an_accelerator_that_is_not_there_computes_on_the_processor(monkeypatch):
    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert find_device("auto").type == "cpu"
