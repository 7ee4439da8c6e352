"""From samples to batches on the device: decoded once, made ahead, nothing read back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_speechcl import SpeechDataset, load_corpus
from hf_speechcl.data.audio import AudioError, read_audio, stream_audio, to_float32, to_int16
from hf_speechcl.training.trainer import ahead
from tests.conftest import SMALL_OBJECTIVES, quieter, wav_bytes
from tests.trainers import make_pretraining_trainer


class ValuesRead(TorchDispatchMode):
    """Counts the tensors whose value Python asks for, for which it would wait until a device has computed them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_trainer_reads_no_value_back_between_log_lines(corpus, tmp_path, monkeypatch):
    trainer = make_pretraining_trainer(
        corpus, tmp_path, {"best_rq": SMALL_OBJECTIVES["best_rq"]}, max_steps=5, logging_steps=4, eval_strategy="no",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    values, read = ValuesRead(), []
    objective_outputs = trainer.objective_outputs

    def uncounted(*args):
        before = values.count
        outputs = objective_outputs(*args)
        values.count = before
        return outputs

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            read.append(values.count)

    monkeypatch.setattr(trainer, "objective_outputs", uncounted)
    trainer.add_callback(Watch())
    with values:
        trainer.train()
    assert read[0] == read[3]  # the fourth ends before its line is written
    assert read[4] > read[3]


def test_samples_of_16_bits_give_the_inputs_that_float32_gives(audio_folder, tmp_path):
    trainer = make_pretraining_trainer(load_corpus("demo", "validation"), tmp_path)
    corpus = load_corpus(str(audio_folder))
    clips, floats = (
        [SpeechDataset(corpus, 16000, in_16_bits=in_16_bits)[0, index] for index in range(4)]
        for in_16_bits in (True, False)
    )
    assert all(clip["input_values"].dtype == np.int16 for clip in clips)
    for options in ({"corrupt_input": True}, {"corrupt_input": False, "num_views": 2}):
        collate = replace(trainer.data_collator, view_augmentation=quieter, **options)
        batch = collate(clips)
        assert batch["input_values"].dtype == (torch.float32 if options["corrupt_input"] else torch.int16)
        assert batch["attention_mask"].dtype == torch.bool
        torch.testing.assert_close(
            trainer._prepare_inputs(batch), trainer._prepare_inputs(collate(floats)), rtol=0, atol=0
        )
    for clip, row in zip(clips, corpus):
        assert (to_float32(clip["input_values"]) == read_audio(row["audio"], 16000)).all()


def test_samples_beyond_full_scale_are_cut_off_and_those_of_another_scale_refused():
    assert to_int16(np.float32([0, 0.5, 1.1, -1.1, 2**-15])).tolist() == [0, 16384, 32767, -32768, 1]
    clip = {"bytes": wav_bytes(np.float32([0, -20000] * 800), subtype="FLOAT"), "path": None}
    for read in (read_audio, lambda *args: list(stream_audio(*args))):
        with pytest.raises(AudioError, match="samples of up to 2e.04, expected -1 to 1"):
            read(clip, 8000)


def test_clips_are_decoded_once_as_far_as_there_is_room(corpus, monkeypatch):
    dataset = SpeechDataset(corpus.select(range(4)), 16000)
    fresh = [dataset[0, index]["input_values"] for index in range(4)]
    dataset.keep_decoded(fresh[0].nbytes + fresh[1].nbytes)
    assert all((dataset[0, index]["input_values"] == clip).all() for index, clip in enumerate(fresh))
    decoded = []
    monkeypatch.setattr("hf_speechcl.data.dataset.read_audio", lambda *args: decoded.append(args) or read_audio(*args))
    assert all((dataset[1, index]["input_values"] == clip).all() for index, clip in enumerate(fresh))
    assert len(decoded) == 2
    assert dataset[1, 0]["seed"] == (0, 1, 0)


def test_batches_are_the_same_whoever_makes_them(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    expected = list(trainer.get_train_dataloader())
    made_by_thread = list(ahead(trainer.get_train_dataloader()))
    trainer.args.dataloader_num_workers = 1
    made_by_process = list(trainer.get_train_dataloader())
    assert len(expected) > 2
    torch.testing.assert_close(made_by_thread, expected, rtol=0, atol=0)
    torch.testing.assert_close(made_by_process, expected, rtol=0, atol=0)


def test_batches_made_ahead_by_processes_that_stay_are_of_every_epoch(corpus, tmp_path, monkeypatch):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "eval_strategy": "no"}
    trainer = make_pretraining_trainer(
        corpus, tmp_path, {"best_rq": {"codebook_size": 8}}, num_train_epochs=3, save_strategy="no", **options
    )
    trainer.makes_ahead = True
    masks, training_step = [], trainer.training_step

    def seen(model, inputs, *args):
        masks.append(inputs["mask_time_indices"].sum(0).tolist())
        return training_step(model, inputs, *args)

    monkeypatch.setattr(trainer, "training_step", seen)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(masks) == 3 * len(trainer.get_train_dataloader())
    epochs = [sorted(masks[first : first + len(masks) // 3]) for first in range(0, len(masks), len(masks) // 3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_items_are_made_ahead_in_order_and_an_error_comes_in_its_place():
    made = []

    def make():
        for number in range(6):
            made.append(number)
            yield number
        raise ValueError("the seventh")

    items = ahead(make(), depth=2)
    for number in range(6):
        assert next(items) == number
        assert len(made) <= number + 4
    with pytest.raises(ValueError, match="the seventh"):
        next(items)
    assert list(ahead([])) == []
