"""Fine-tuning: which parameters learn how fast, adapters, the best checkpoint, blank collapse."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC, SpeechCLForSequenceClassification, SpeechDataset
from hf_speechcl.ctc import build_processor
from hf_speechcl.data import CTCCollator
from hf_speechcl.recognizer import SpeechRecognizer
from hf_speechcl.training import ctc_trainer
from hf_speechcl.training.ctc_trainer import BlankGuard, CTCTrainer, CTCTrainingArguments
from hf_speechcl.training.finetune_classifier import ClassifierTrainingArguments
from hf_speechcl.training.finetune_classifier import main as finetune_classifier
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.finetuning import (
    FineTuningArguments,
    FineTuningModelArguments,
    check_frozen_share,
    choose_trained,
)
from hf_speechcl.training.guard import CollapseError
from tests.conftest import SHORT_RUN, TINY, TINY_OPTIONS

TEXTS = ["on", "no", "on no", "oo nn"]


def make_trainer(corpus, output_dir, model_options=(), config_options=(), **arguments):
    """A CTC trainer on twelve clips, whose made-up texts can be learnt by heart."""
    dataset = SpeechDataset(corpus.select(range(12)), 16000)
    processor = build_processor(TEXTS, 16000)
    texts = [TEXTS[row % len(TEXTS)] for row in range(len(dataset))]
    labels = processor.tokenizer(texts).input_ids
    model = SpeechCLForCTC(SpeechCLConfig(**TINY, vocab_size=len(processor.tokenizer), **dict(config_options)))
    args = CTCTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, report_to="none", disable_tqdm=True, **arguments
    )
    model_args = FineTuningModelArguments(model="some/encoder", **dict(model_options))
    tuner = choose_trained(model, model_args, args, masks_frames=False)
    frame_length = model._get_feat_extract_output_lengths
    trainer = CTCTrainer(
        model=model,
        args=args,
        references=texts,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=CTCCollator(frame_length, labels),
        max_seconds_per_batch=20,
        processing_class=processor,
    )
    trainer.tuner = tuner
    return trainer


def changed_by_training(trainer) -> set[str]:
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}


def test_learning_rates_fall_by_the_layer_and_the_head_keeps_its_own(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, learning_rate=0.8, head_learning_rate=5.0, layer_decay=0.5)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if not name.startswith("speechcl.")} == {5.0}
    expected = {"norm.": 0.8, "layers.1.": 0.8, "layers.0.": 0.4, "feature_": 0.2, "subsampling.": 0.2}
    for part, rate in expected.items():
        assert {found for name, found in rates.items() if name.startswith(f"speechcl.{part}")} == {rate}
    assert set(rates) == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainer.optimizer.param_groups[0]["lr"] == 0.8  # the one in the log
    without = {group["lr"] for group in make_trainer(corpus, tmp_path).create_optimizer().param_groups}
    assert without == {5e-4, 2e-3}


def test_frozen_encoder_with_a_weighted_sum_trains_the_head_and_the_weights_only(corpus, tmp_path):
    trainer = make_trainer(
        corpus, tmp_path, config_options={"use_weighted_layer_sum": True}, freeze_encoder_steps=-1, max_steps=2,
        eval_strategy="no", save_strategy="no", warmup_steps=0,
    )  # fmt: skip
    assert changed_by_training(trainer) == {"layer_weights", "lm_head.weight", "lm_head.bias"}


def test_a_share_of_frozen_updates_is_of_the_length_that_the_run_was_begun_with(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 8, "max_steps": 8, "num_train_epochs": 2}')
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    for longer in ({"max_steps": 20}, {"num_train_epochs": 3}):
        with pytest.raises(
            ValueError, match=r"freeze_encoder_steps=0.5 is a share of the run, whose .* and is (20|3) now"
        ):
            check_frozen_share(FineTuningArguments(**options, freeze_encoder_steps=0.5, **longer), str(checkpoint))
        check_frozen_share(FineTuningArguments(**options, freeze_encoder_steps=4, **longer), str(checkpoint))
    for same in ({"max_steps": 8}, {"num_train_epochs": 1.5}):
        check_frozen_share(FineTuningArguments(**options, freeze_encoder_steps=0.5, **same), str(checkpoint))


@pytest.mark.parametrize("model_class", [SpeechCLForCTC, SpeechCLForSequenceClassification])
def test_weighted_sum_begins_as_the_mean_of_all_layers_and_loads_as_saved(model_class, clips, tmp_path):
    model = model_class(SpeechCLConfig(**TINY, use_weighted_layer_sum=True)).eval()
    values = torch.from_numpy(clips[0])[None]
    states = model.speechcl(values, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(model.encode(values, None)[0], torch.stack(states).mean(0))
    model.layer_weights.data = torch.tensor([0.0, 0.0, 100.0])
    torch.testing.assert_close(model.encode(values, None)[0], states[-1])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model_class.from_pretrained(tmp_path)(values).logits, model(values).logits)


def test_new_layer_weights_on_a_pretrained_encoder_are_equal(config, tmp_path):
    SpeechCLForCTC(config).save_pretrained(tmp_path)
    model = SpeechCLForSequenceClassification.from_pretrained(tmp_path, use_weighted_layer_sum=True)
    assert model.layer_weights.tolist() == [0, 0, 0]


def test_adapters_and_head_are_all_that_lora_trains_and_the_merged_model_is_an_ordinary_one(corpus, clips, tmp_path):
    plain = make_trainer(corpus, tmp_path).model.state_dict()
    torch.manual_seed(0)
    trainer = make_trainer(
        corpus, tmp_path, {"lora_rank": 2, "lora_targets": ["v_proj"]}, max_steps=3, eval_strategy="no",
        save_strategy="no", warmup_steps=0, learning_rate=1e-2,
    )  # fmt: skip
    changed = changed_by_training(trainer)
    adapters = {f"speechcl.layers.{n}.attention.v_proj.lora_{m}.default.weight" for n in (0, 1) for m in "AB"}
    assert changed == adapters | {"lm_head.weight", "lm_head.bias"}
    values = torch.from_numpy(clips[0])[None]
    trainer.model.eval()
    with torch.no_grad():
        adapted = trainer.model(values).logits
        trainer.tuner.merge_and_unload()
        torch.testing.assert_close(trainer.model(values).logits, adapted)
    trainer.save_model()
    merged = load_file(tmp_path / "model.safetensors")
    assert set(merged) == set(plain)
    moved = {name for name in merged if name.startswith("speechcl.") and not torch.equal(merged[name], plain[name])}
    assert moved == {f"speechcl.layers.{n}.attention.v_proj.weight" for n in (0, 1)}
    torch.testing.assert_close(AutoModelForCTC.from_pretrained(tmp_path)(values).logits, adapted)


def test_lora_resumes_exactly_and_its_folder_transcribes(audio_folder, clips, tmp_path):
    """Also with pieces, from a recogniser, and with the best checkpoint chosen."""
    (audio_folder / "metadata.csv").write_text(
        "\n".join(["file_name,text", *(f"clip{n}.wav,{text}" for n, text in enumerate(["Un 1", "uno", "no nu", "no"]))])
    )
    base, whole, again = tmp_path / "base", tmp_path / "whole", tmp_path / "again"
    common = ["--corpus", str(audio_folder), *SHORT_RUN, "--eval_steps", "2", "--save_steps", "2"]
    finetune_ctc(
        [*common, "--output_dir", str(base), "--max_steps", "2", "--model", "tiny", "--model_options", *TINY_OPTIONS]
        + ["--vocabulary", "bpe", "--vocab_size", "10", "--casing", "upper", "--digits", "leave_out"]
        + ["--validation_fraction", "0.1", "--head_learning_rate", "0.1", "--warmup_steps", "0"]
    )
    assert not (base / "vocab.json").exists()
    assert "digits" in [
        problem["reason"]
        for split in ("train", "validation")
        for problem in json.loads((base / f"preflight_{split}.json").read_text())["problems"]
    ]
    lora = [*common, "--model", str(base), "--lora_rank", "2", "--max_steps", "4"]
    finetune_ctc([*lora, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    finetune_ctc([*lora, "--output_dir", str(again), "--resume_from_checkpoint", "last"])
    first, second = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (whole, again))
    assert any("lora_A" in name for name in first)
    with pytest.raises(ValueError, match="checkpoint-4 holds low-rank adapters that are not merged into its weights"):
        SpeechRecognizer.from_pretrained(str(whole / "checkpoint-4"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)

    assert (whole / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    config = AutoModelForCTC.from_pretrained(whole).config
    assert config.text_policy == {"casing": "upper", "punctuation": "remove", "digits": "leave_out", "language": "en"}
    state = json.loads((whole / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] in ("checkpoint-2", "checkpoint-4")
    model, processor = AutoModelForCTC.from_pretrained(whole).eval(), AutoProcessor.from_pretrained(whole)
    recognizer = pipeline("automatic-speech-recognition", model=str(whole))
    model.lm_head.bias.data[0] = recognizer.model.lm_head.bias.data[0] = -100  # no blanks: some text, of two updates
    texts = []
    for clip in clips:
        tokens = model(**processor(clip, sampling_rate=16000, return_tensors="pt")).logits.argmax(-1)
        texts += processor.batch_decode(tokens)
    assert [recognizer(clip)["text"] for clip in clips] == texts
    assert any(texts)
    assert {char for text in texts for char in text} <= set("UNO ")
    with pytest.raises(ValueError, match="is a recogniser with a vocabulary: leave it out"):
        finetune_ctc([*common, "--model", str(base), "--vocabulary", "bpe", "--output_dir", str(tmp_path / "other")])


def fake_rates(monkeypatch, rates):
    """Word error rates of the validations to come."""
    rates = iter(rates)
    summarize = CTCTrainer.summarize

    def with_rate(self, sums):
        scalars = summarize(self, sums)
        return scalars if self.model.training else scalars | {"wer": next(rates)}

    monkeypatch.setattr(CTCTrainer, "summarize", with_rate)


def test_best_checkpoint_by_wer_is_what_is_left_also_after_a_resume(corpus, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "hf_speechcl")
    options = {"max_steps": 5, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "warmup_steps": 0}
    fake_rates(monkeypatch, [0.9, 0.3, 0.5, 0.1])
    trainer = make_trainer(corpus, tmp_path, **options)
    trainer.train()
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    torch.testing.assert_close(trainer.model.state_dict(), best, rtol=0, atol=0)
    assert "the weights are those of checkpoint-4, the best by validation wer (0.3)" in caplog.text
    trainer.save_state()
    assert str(tmp_path) not in (tmp_path / "trainer_state.json").read_text()

    # The last update is validated, although 5 is no multiple of 2.
    resumed = make_trainer(corpus, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (resumed.state.best_model_checkpoint, resumed.state.best_metric) == ("checkpoint-5", 0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"save_strategy": "no"}, False),
        ({"eval_strategy": "no"}, False),
        ({"eval_steps": 300}, False),
        ({"eval_steps": 100}, True),
        ({"eval_strategy": "epoch"}, False),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, True),
        ({"save_strategy": "best"}, True),
        ({"load_best_model_at_end": False}, False),
    ],
)
def test_best_checkpoint_is_taken_where_every_checkpoint_is_validated(options, expected, tmp_path):
    for kind, greater_is_better in ((CTCTrainingArguments, False), (ClassifierTrainingArguments, True)):
        args = kind(output_dir=str(tmp_path), use_cpu=True, **options)
        assert args.load_best_model_at_end == expected
        assert args.greater_is_better == greater_is_better


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ((0.9, 0.8, 0.5, 0.6, 0.7, 0.65), 4),  # update 3 was better and has no checkpoint
        ((0.5, 0.8, 0.6, 0.6, 0.7, 0.7), 4),
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 6),  # all write nothing: the last has learnt most
    ],
)
def test_the_best_is_a_checkpoint_and_of_equal_ones_the_last(rates, best, corpus, tmp_path, monkeypatch):
    given = iter([*rates, 2.0])
    monkeypatch.setattr(CTCTrainer, "summarize", lambda self, sums: {"ctc/loss": 1.0, "wer": next(given)})
    trainer = make_trainer(corpus, tmp_path, max_steps=6, eval_steps=1, save_steps=2, save_total_limit=None)
    trainer.train()
    assert trainer.taken_update == best
    validated = [entry["step"] for entry in trainer.state.log_history if "eval_wer" in entry]
    trainer.evaluate()
    again = [entry["step"] for entry in trainer.state.log_history if "eval_wer" in entry]
    assert again == validated + ([6] if best == 6 else [])  # weights of before the last update are not its own
    torch.testing.assert_close(
        trainer.model.state_dict(), load_file(tmp_path / f"checkpoint-{best}/model.safetensors"), rtol=0, atol=0
    )


def test_validation_reads_nothing_on_padding_of_models_that_write_there(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path)
    forward = SpeechCLForCTC.forward

    def write_everywhere(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = torch.nn.functional.one_hot(torch.full(outputs.logits.shape[:2], 3), self.config.vocab_size)
        return outputs

    monkeypatch.setattr(SpeechCLForCTC, "forward", write_everywhere)
    decoded = []
    decode = trainer.processing_class.batch_decode
    monkeypatch.setattr(trainer.processing_class, "batch_decode", lambda ids: decoded.append(ids) or decode(ids))
    trainer.evaluate()
    written = torch.cat([(tokens == 3).sum(1) for tokens in decoded]).sort().values
    lengths = [trainer.model._get_feat_extract_output_lengths(round(16000 * s)) for s in trainer.eval_dataset.durations]
    torch.testing.assert_close(written, torch.tensor(sorted(lengths)), rtol=0, atol=1)


def test_validation_writes_one_space_where_frames_have_two(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path)
    trainer.references = ["on o"] * 12
    ids = trainer.processing_class.tokenizer.convert_tokens_to_ids(["o", "n", "|", "[PAD]", "|", "o"])
    forward = SpeechCLForCTC.forward

    def write(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        tokens = torch.full(outputs.logits.shape[:2], ids[3])
        tokens[:, : len(ids)] = torch.tensor(ids)
        outputs.logits = torch.nn.functional.one_hot(tokens, self.config.vocab_size)
        return outputs

    monkeypatch.setattr(SpeechCLForCTC, "forward", write)
    assert trainer.evaluate()["eval_cer"] == 0


def test_absurd_learning_rate_collapses_to_blank_and_is_told(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ctc_trainer, "PATIENCE", 10)
    trainer = make_trainer(
        corpus, tmp_path, learning_rate=0.1, head_learning_rate=0.05, warmup_steps=0, max_steps=60, eval_steps=20,
        save_strategy="no", stop_on_collapse=2, lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(CollapseError, match="stopped at update 40, as stop_on_collapse asks"):
        trainer.train()
    assert trainer.guard.verdict == "collapsed"
    assert "learning_rate is 0.1, where 0.0005 is usual; head_learning_rate is 0.05" in caplog.text
    assert "Remedy: divide learning_rate" in caplog.text
    last = [entry for entry in trainer.state.log_history if "eval_wer" in entry][-1]
    assert last["eval_ctc/empty_share"] == last["eval_ctc/blank_share"] == 1


def test_healthy_run_is_not_flagged(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ctc_trainer, "PATIENCE", 40)
    trainer = make_trainer(
        corpus, tmp_path, learning_rate=3e-3, max_steps=80, eval_steps=80, save_strategy="no", warmup_steps=0.1
    )
    trainer.train()
    assert trainer.guard.verdict == "healthy"
    assert "blank guard" not in "".join(r.message for r in caplog.records if r.levelno >= logging.WARNING)
    last = [entry for entry in trainer.state.log_history if "eval_wer" in entry][-1]
    assert last["eval_ctc/empty_share"] < 0.5
    assert last["eval_ctc/blank_share"] < 1


def test_guard_knows_the_beginning_the_end_and_one_text_for_all(tmp_path, caplog):
    def verdict(hypotheses, update, num_updates=1000):
        guard = BlankGuard(CTCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, warmup_steps=50))
        guard.judge(hypotheses, references, 0.9, update, num_updates)
        return guard.verdict

    references = ["a", "b", "c", "d"]
    assert verdict([""] * 4, 350) == "collapsed"
    assert verdict([""] * 4, 349) == "healthy"
    assert verdict([""] * 4, 100, num_updates=100) == "suspicious"
    assert "train for more than 350 updates" in caplog.text
    assert verdict(["e"] * 4, 400) == "collapsed"
    assert verdict(["e", "e", "e", ""], 400) == "healthy"


def test_blank_share_is_of_frames_that_are_no_padding(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    nn_bias = trainer.model.lm_head.bias
    trainer.model.lm_head.weight.data.zero_()
    nn_bias.data = torch.arange(len(nn_bias)).float()
    assert trainer.evaluate()["eval_ctc/blank_share"] == 0
    nn_bias.data[0] = 100
    metrics = trainer.evaluate()
    assert (metrics["eval_ctc/blank_share"], metrics["eval_ctc/empty_share"]) == (1, 1)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (finetune_ctc, ["--vocabulary", "words"], "vocabulary must be characters, unigram, bpe, found 'words'"),
        (finetune_ctc, ["--vocab_size", "50"], "vocab_size=50 is for vocabularies of pieces"),
        (finetune_ctc, ["--vocabulary", "bpe", "--vocab_size", "9"], "vocab_size=9 has no room for"),
        (finetune_ctc, ["--digits", "some"], "digits must be keep, words, leave_out, found 'some'"),
        (finetune_ctc, ["--layer_decay", "1.5"], "layer_decay must be above 0 and at most 1"),
        (finetune_ctc, ["--freeze_encoder_steps", "-2"], "freeze_encoder_steps must not be negative but for -1"),
        (finetune_ctc, ["--lora_rank", "4"], "lora_rank adapts a pre-trained encoder"),
        (finetune_ctc, ["--lora_targets", "lm_head"], "lora_targets: found lm_head, expected names among q_proj"),
        (finetune_classifier, ["--label_column", "word"], "demo has no column 'word'"),
        (finetune_classifier, ["--label_column", "speaker"], "expected two classes at least, found en_US_f_Allison"),
        (finetune_classifier, ["--mask_time_span", "0"], "mask_time_span must be positive"),
        (finetune_classifier, ["--stop_on_collapse", "2"], "stop_on_collapse is not used: no guard watches a class"),
        (finetune_ctc, ["--grad_cache", "False"], "grad_cache is not used: no clips are compared"),
    ],
)
def test_wrong_option_stops_the_run_with_its_name(main, arguments, message, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        main(["--use_cpu", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", *arguments])
    assert message in f"{error.value}\n{capsys.readouterr().err}"
