#!/usr/bin/env python
"""transformers' Wav2Vec2 as an arm of the comparison: `python scripts/benchmarks/peer.py pretrain --help`."""

import json
import logging
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, set_seed
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from hf_speechcl.command_line import option, parse_arguments
from hf_speechcl.ctc import build_processor, preflight
from hf_speechcl.data import CTCCollator, DurationBatchSampler, SpeechDataset
from hf_speechcl.data.corpora import load_train_and_validation
from hf_speechcl.text_policy import TextPolicy, apply_policy
from hf_speechcl.training.arguments import CorpusArguments, set_up_logging
from hf_speechcl.training.ctc_trainer import CTCTrainer, CTCTrainingArguments
from hf_speechcl.training.resume import find_checkpoint, keep_options
from hf_speechcl.training.trainer import finish_run

logger = logging.getLogger("peer")

SAMPLING_RATE = 16000
STATE = "state.pt"  # of a checkpoint: optimizer, generators, counters
WARM_UP = 0.08  # share of the run: 32,000 of 400,000 updates in the paper
TEMPERATURES = (2.0, 0.5)  # of the Gumbel softmax, the lower one reached after 0.7 of the run: 277,000 of 400,000
TEMPERATURE_ANNEAL = 0.7
DESCRIPTION = """Pre-train transformers' Wav2Vec2ForPreTraining for a given time with the recipe of Baevski et al. 2020
(arXiv 2006.11477), its schedules scaled to the length of the run; fine-tune it with CTC, on the same clips, batches and
labels as scripts/pretrain.py and scripts/finetune_ctc.py have.

    python scripts/benchmarks/peer.py pretrain --corpus my_audio --seconds 600 --output_dir runs/peer
    python scripts/benchmarks/peer.py finetune --model runs/peer --corpus my_labelled_audio --max_steps 800 \\
      --output_dir runs/peer-ctc

A killed run goes on with --resume_from_checkpoint last."""


@dataclass
class PeerArguments(CorpusArguments):
    output_dir: str = option("runs/peer", "Folder for the model.")
    seconds: float = option(0.0, "Length of the run in CPU time, or in wall time on a GPU; or give max_steps.")
    max_steps: int = option(0, "Length of the run in updates.")
    hidden_size: int = option(256, "Width of the Transformer.")
    num_hidden_layers: int = option(6, "Its layers.")
    num_attention_heads: int = option(4, "Its heads.")
    intermediate_size: int = option(1024, "Width of its feed-forward blocks.")
    conv_dim: int = option(256, "Channels of the seven convolutions; 512 in the paper.")
    learning_rate: float = option(5e-4, "Highest learning rate.")
    mask_time_prob: float = option(0.65, "Length of all masked spans together, as a share of the clip.")
    mask_time_length: int = option(10, "Frames of a masked span.")
    max_seconds: float = option(15.0, "Longer recordings are split into equal parts of at most this many seconds.")
    min_seconds: float = option(0.4, "Shorter clips are left out.")
    bf16: bool = option(False, "bfloat16 autocast.")
    use_cpu: bool = option(False, "Not on a GPU.")
    seed: int = option(42, "Of weights, batches, masks and negatives.")
    save_steps: int = option(1000, "Updates between two checkpoints, of which the last is kept.")
    logging_steps: int = option(50, "Updates between two log lines.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'last' for the newest in output_dir.")

    def __post_init__(self):
        if (self.seconds > 0) == (self.max_steps > 0):
            raise ValueError(f"give seconds or max_steps, found seconds={self.seconds:g}, max_steps={self.max_steps}")


@dataclass
class PeerModelArguments:
    model: str = option("runs/peer", "Folder that `peer.py pretrain` wrote.")
    mask_time_prob: float = option(0.3, "Length of all masked spans of frames together, as a share of the clip.")
    mask_feature_prob: float = option(0.1, "The same of channels, in spans of 64 or a quarter of the width.")


@dataclass
class PeerDataArguments(CorpusArguments):
    max_seconds: float = option(30.0, "Longer clips are left out.")


PRETRAINING_ARGUMENTS = (PeerArguments,)
FINETUNING_ARGUMENTS = (PeerModelArguments, PeerDataArguments, CTCTrainingArguments)


def build_model(args: PeerArguments) -> Wav2Vec2ForPreTraining:
    """A new model: the layer-norm variant, which transformers can pre-train, with the dropout of wav2vec 2.0 Base."""
    config = Wav2Vec2Config(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        conv_dim=(args.conv_dim,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0,
        feat_proj_dropout=0.1,
        feat_quantizer_dropout=0.1,
        layerdrop=0.05,
        mask_time_prob=args.mask_time_prob,
        mask_time_length=args.mask_time_length,
    )
    return Wav2Vec2ForPreTraining(config)


def normalize(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Waveforms (B, S) with mean 0 and variance 1 where `mask` is true, and 0 elsewhere, as the feature extractor."""
    mask = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    lengths = mask.sum(1, keepdim=True)
    centred = (values - (values * mask).sum(1, keepdim=True) / lengths) * mask
    return centred / (centred.square().sum(1, keepdim=True) / lengths + 1e-7).sqrt()


def make_batch(model: Wav2Vec2ForPreTraining, clips: list[np.ndarray], seed: list[int]) -> dict[str, torch.Tensor]:
    """A batch with masks and negatives by transformers' own functions, which draw from numpy's global generator."""
    lengths = torch.tensor([len(clip) for clip in clips])
    values = torch.nn.utils.rnn.pad_sequence([torch.tensor(clip) for clip in clips], batch_first=True)
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    frames = model._get_feat_extract_output_lengths(lengths)
    num_frames = int(model._get_feat_extract_output_lengths(values.shape[1]))
    frame_mask = torch.arange(num_frames) < frames[:, None]
    config, shape = model.config, (len(clips), num_frames)
    np.random.seed(seed)
    masked = _compute_mask_indices(
        shape, config.mask_time_prob, config.mask_time_length, attention_mask=frame_mask.long(), min_masks=2
    )
    negatives = _sample_negative_indices(shape, config.num_negatives, mask_time_indices=masked)
    return {
        "input_values": normalize(values, mask),
        "attention_mask": mask.long(),
        "mask_time_indices": torch.from_numpy(masked),
        "sampled_negative_indices": torch.from_numpy(negatives),
    }


class PeerPretraining:
    """A run of pre-training.

    Args:
        args: options.
        dataset: clips, in float32.
    """

    def __init__(self, args: PeerArguments, dataset: SpeechDataset):
        self.args, self.dataset = args, dataset
        set_seed(args.seed)
        self.device = torch.device("cpu" if args.use_cpu or not torch.cuda.is_available() else "cuda")
        self.model = build_model(args).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
        )
        self.sampler = DurationBatchSampler(dataset.durations, args.max_seconds_per_batch, seed=args.seed)
        self.updates, self.position, self.spent, self.seconds_seen = 0, 0, 0.0, 0.0
        self.log: list[dict] = []

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.updates / self.args.max_steps if self.args.max_steps else self.spent / self.args.seconds

    def _clock(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.monotonic()

    def train(self) -> None:
        """Go on to the end of the run."""
        self.model.train()
        began, spent_before = self._clock(), self.spent
        losses: list[float] = []
        while self.progress < 1:
            epoch, position = divmod(self.position, len(self.sampler))
            if position == 0 or not losses:
                self.sampler.set_epoch(epoch)
                batches = list(self.sampler)
            losses.append(self._update(batches[position]))
            self.spent = spent_before + self._clock() - began
            if self.updates % self.args.logging_steps == 0 or self.progress >= 1:
                entry = {"step": self.updates, "loss": float(np.mean(losses[-self.args.logging_steps :]))}
                self.log.append({**entry, "audio_hours": self.seconds_seen / 3600})
                logger.info("%s", self.log[-1])
            if self.updates % self.args.save_steps == 0 and self.progress < 1:
                self.save_checkpoint()

    def _update(self, keys: list[tuple[int, int]]) -> float:
        seed = [self.args.seed, self.position]
        self.position += 1
        clips = [clip for key in keys if (clip := self.dataset[key]["input_values"]) is not None]
        if not clips:
            return float("nan")
        batch = {name: values.to(self.device) for name, values in make_batch(self.model, clips, seed).items()}
        progress = min(self.progress, 1.0)
        share = progress / WARM_UP if progress < WARM_UP else (1 - progress) / (1 - WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * max(share, 1e-3)
        highest, lowest = TEMPERATURES
        self.model.set_gumbel_temperature(highest * (lowest / highest) ** min(progress / TEMPERATURE_ANNEAL, 1.0))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = self.model(**batch).loss / batch["mask_time_indices"].sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.seconds_seen += sum(map(len, clips)) / SAMPLING_RATE
        return loss.item()

    def save(self, folder: Path) -> None:
        """The model, as `AutoModel` loads it, and the log as the Trainer writes it."""
        self.model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
        state = {"global_step": self.updates, "log_history": self.log}
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")

    def save_checkpoint(self) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.updates}")
        folder.mkdir(parents=True, exist_ok=True)
        counters = {name: getattr(self, name) for name in ("updates", "position", "spent", "seconds_seen", "log")}
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"optimizer": self.optimizer.state_dict(), "random": random, "counters": counters}
        torch.save(state, folder / STATE)
        self.save(folder)
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)

    def load_checkpoint(self, folder: Path) -> None:
        # In place, as the optimizer holds the model's parameters.
        self.model.load_state_dict(Wav2Vec2ForPreTraining.from_pretrained(folder).state_dict())
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        for name, value in state["counters"].items():
            setattr(self, name, value)


def load_corpora(args: CorpusArguments, **columns) -> tuple:
    return load_train_and_validation(
        args.corpus,
        args.validation_fraction,
        args.train_split,
        args.validation_split,
        audio_column=args.audio_column,
        **columns,
    )


def pretrain(argv: list[str]) -> None:
    (args,) = parse_arguments(PRETRAINING_ARGUMENTS, DESCRIPTION, argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, STATE)
    train, _ = load_corpora(args)
    dataset = SpeechDataset(train, SAMPLING_RATE, args.seed, args.max_seconds, args.min_seconds, in_16_bits=False)
    dataset.keep_decoded(4e9)  # of float32, as many seconds as the other arms keep in 16 bits
    run = PeerPretraining(args, dataset)
    if checkpoint is not None:
        run.load_checkpoint(Path(checkpoint))
    run.train()
    run.save(Path(args.output_dir))
    logger.info("%d updates, %d parameters", run.updates, run.model.num_parameters())


class PeerTrainer(CTCTrainer):
    """Fine-tunes a `Wav2Vec2ForCTC`, all parameters with one learning rate, on clips of mean 0 and variance 1."""

    def learning_rate_of(self, name: str) -> float:
        return self.args.learning_rate

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return inputs | {"input_values": normalize(inputs["input_values"], inputs.get("attention_mask"))}


def finetune(argv: list[str]) -> None:
    model_args, data_args, args = parse_arguments(FINETUNING_ARGUMENTS, DESCRIPTION, argv)
    set_up_logging(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    keep_options(args, checkpoint, model_args, data_args)
    corpora = load_corpora(data_args, scored_by="text", text_column="text", require_text=True)
    texts = [apply_policy(TextPolicy(), corpus["text"])[0] for corpus in corpora]
    processor = build_processor([text for text in texts[0] if text], SAMPLING_RATE)
    processor.feature_extractor.do_normalize = True

    set_seed(args.seed)
    width = Wav2Vec2Config.from_pretrained(model_args.model).hidden_size
    model = Wav2Vec2ForCTC.from_pretrained(
        model_args.model,
        vocab_size=len(processor.tokenizer),
        pad_token_id=processor.tokenizer.pad_token_id,
        ctc_loss_reduction="sum",
        ctc_zero_infinity=True,
        mask_time_prob=model_args.mask_time_prob,
        mask_feature_prob=model_args.mask_feature_prob,
        mask_feature_length=min(64, width // 4),
    )
    model.freeze_feature_encoder()
    frame_length = model._get_feat_extract_output_lengths
    datasets, labels = [], []
    for corpus, own in zip(corpora, texts):
        kept, kept_labels, report = preflight(
            corpus, own, processor.tokenizer, frame_length, SAMPLING_RATE, data_args.max_seconds
        )
        logger.info("%s", report)
        datasets.append(SpeechDataset(corpus.select(kept), SAMPLING_RATE, args.seed, min_seconds=0))
        labels.append(kept_labels)
        references = [own[row] for row in kept]
    trainer = PeerTrainer(
        model=model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        references=references,
        data_collator=CTCCollator(frame_length=frame_length, labels=labels[0]),
        eval_collator=CTCCollator(frame_length=frame_length, labels=labels[1]),
        max_seconds_per_batch=data_args.max_seconds_per_batch,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    finish_run(trainer, result.metrics["train_runtime"], lambda *_: None)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"pretrain": pretrain, "finetune": finetune}
    if not argv or argv[0] not in commands:
        sys.exit(f"{DESCRIPTION}\n\nexpected pretrain or finetune first, found {argv[0] if argv else 'nothing'}")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
