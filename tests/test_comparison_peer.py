"""The peer of the comparison, transformers' Wav2Vec2ForPreTraining."""

import json

import torch
from safetensors.torch import load_file
from transformers import pipeline

SMALL_PEER = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --conv_dim 16 "
    "--use_cpu True --max_seconds_per_batch 4 --logging_steps 1 --save_steps 2"
).split()


def test_peer_resumes_exactly_and_is_fine_tuned_to_a_recognizer(scripts, small_data, tmp_path, clips):
    folder, corpus = tmp_path / "peer", str(small_data / "prompts_en")
    argv = ["pretrain", "--corpus", corpus, "--max_steps", "4", "--output_dir", str(folder), *SMALL_PEER]
    scripts.peer.main(argv)
    whole = load_file(folder / "model.safetensors")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    (folder / "model.safetensors").unlink()
    scripts.peer.main([*argv, "--resume_from_checkpoint", "last"])
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == log
    assert 0 < log[0]["audio_hours"] < log[-1]["audio_hours"]

    argv = "--max_steps 2 --use_cpu --eval_strategy no --save_strategy no --report_to none --max_seconds_per_batch 6"
    recognizer = tmp_path / "ctc"
    scripts.peer.main(
        ["finetune", "--model", str(folder), "--corpus", corpus, "--output_dir", str(recognizer), *argv.split()]
    )
    trained, conv = load_file(recognizer / "model.safetensors"), "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
    assert torch.equal(trained[conv], resumed[conv])
    assert "text" in pipeline("automatic-speech-recognition", model=str(recognizer))(clips[2])


def test_peer_stops_when_its_time_is_spent(scripts, small_data, tmp_path, monkeypatch):
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(scripts.peer.time, "process_time", lambda: float(next(times)))
    argv = ["pretrain", "--corpus", str(small_data / "prompts_en"), "--seconds", "30", "--output_dir", str(tmp_path)]
    scripts.peer.main([*argv, *SMALL_PEER])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_peer_normalizes_clips_as_its_feature_extractor(scripts):
    clips = [torch.randn(900) * 3 + 1, torch.randn(700)]
    values = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.arange(900) < torch.tensor([[900], [700]])
    extractor = scripts.peer.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor([clip.numpy() for clip in clips], sampling_rate=16000, padding=True, return_tensors="pt")
    torch.testing.assert_close(scripts.peer.normalize(values, mask), expected["input_values"], atol=1e-5, rtol=1e-4)
