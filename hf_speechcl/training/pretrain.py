"""Pre-train an encoder on unlabelled speech."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor, set_seed

from ..cards import (
    USE_ENCODER,
    data_row,
    describe_limits,
    describe_model,
    describe_objectives,
    describe_run,
    metrics_table,
    write_card,
)
from ..citations import methods_of
from ..command_line import parse_arguments, parse_assignments
from ..configuration_speechcl import SIZES, SpeechCLConfig
from ..data import PretrainingCollator, SpeechDataset
from ..data.augment import Augmentation, check_probabilities, keeps_time
from ..data.columns import column_of
from ..data.corpora import load_corpus, load_train_and_validation
from ..data.folders import source_name
from ..data.units import Units
from ..distributed import leaves_launch
from ..evaluation.probe import PhoneProbe
from ..features import HiddenStates
from ..hub import find_model, may_be_model, read_config
from ..pretraining import SpeechCLForPreTraining, objective_options
from .arguments import (
    PretrainingDataArguments,
    PretrainingModelArguments,
    ProbeArguments,
    SpeechTrainingArguments,
    parse_config_options,
    parse_objectives,
    set_up_logging,
)
from .pretraining_trainer import PROBE_METRICS, PretrainingTrainer, layer_names
from .resume import find_checkpoint, keep_options
from .trainer import finish_run, prepare_to_push

logger = logging.getLogger(__name__)

ARGUMENTS = (PretrainingModelArguments, PretrainingDataArguments, ProbeArguments, SpeechTrainingArguments)
DESCRIPTION = """Pre-train a SpeechCL encoder on speech without transcripts.

  The embedded corpus, on a CPU:
    python scripts/pretrain.py --output_dir runs/demo --max_steps 200
  A folder of your own recordings, any format, rate and length:
    python scripts/pretrain.py --corpus my_audio --encoder small --max_steps 20000 --output_dir runs/mine
  Two objectives on one encoder pass, options of one changed:
    python scripts/pretrain.py --objectives best_rq=1.0 wav2vec2=0.5 --objective_options best_rq.codebook_size=1024
  From a file, with one option changed; on all GPUs of a machine; a killed run goes on:
    accelerate launch scripts/pretrain.py --config scripts/configs/gpu-1h.yaml --corpus my_audio --max_steps 3500
    accelerate launch scripts/pretrain.py --config scripts/configs/gpu-1h.yaml --corpus my_audio --max_steps 3500 \\
      --resume_from_checkpoint last
  Views of an utterance against those of others; classes of a column of metadata, for a Prototypical network:
    python scripts/pretrain.py --objectives info_nce --view_augmentations gain=1 noise=0.5 --noise_corpus my_noise
    python scripts/pretrain.py --objectives prototypical --corpus my_audio --label_column speaker
  Masked prediction of clean targets from corrupted input:
    python scripts/pretrain.py --objectives best_rq --corrupt_input --corruptions noise=0.5 mix=0.3
  The units of scripts/make_units.py, for the objective hubert:
    python scripts/pretrain.py --objectives hubert --units runs/units --output_dir runs/hubert
  With what each validation finds of phones in the encoder, by clips with the columns phones and phone_ends:
    python scripts/pretrain.py --corpus my_audio --probe_corpus my_phones.parquet

The output folder holds checkpoints, the model for AutoModel.from_pretrained, curves.png and a model card."""


def build_model(model_args: PretrainingModelArguments, units: Units | None = None) -> SpeechCLForPreTraining:
    """A new model of a named size, or one that goes on from a SpeechCL folder or Hub repository."""
    objectives = parse_objectives(model_args.objectives, model_args.objective_options)
    for name in objectives:
        objective_options(name)
    fill_units(objectives, units)
    overrides = parse_config_options(model_args.encoder_options, "encoder_options")
    if model_args.encoder in SIZES:
        return SpeechCLForPreTraining(SpeechCLConfig.from_size(model_args.encoder, objectives=objectives, **overrides))
    if overrides:
        raise ValueError("encoder_options change a new encoder: leave them out with an encoder that has its weights")
    if not may_be_model(model_args.encoder):
        raise ValueError(
            f"encoder {model_args.encoder!r}: expected {', '.join(SIZES)}, starter, a folder or a Hub name"
        )
    folder = find_model(model_args.encoder)
    earlier = (read_config(model_args.encoder, folder).objectives or {}).get("best_rq")
    check_units(units, folder)
    if earlier and "best_rq" in objectives and earlier.get("seed", 0) != objectives["best_rq"].get("seed", 0):
        raise ValueError(
            f"best_rq.seed: {model_args.encoder} has quantisers of seed {earlier.get('seed', 0)}, go on with that one"
        )
    config = read_config(model_args.encoder, folder, objectives=objectives)
    # Objectives may have other options than those the folder was trained with: what no longer fits is drawn anew.
    return SpeechCLForPreTraining.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, use_safetensors=True
    )


def fill_units(objectives: dict[str, dict], units: Units | None) -> None:
    """Set the options of hubert that the units decide.

    Raises:
        ValueError: hubert without units, units without hubert, or an option that says something else.
    """
    if "hubert" in objectives and units is None:
        raise ValueError(
            "the objective hubert needs units: make them with `python scripts/make_units.py --corpus CORPUS "
            "--output_dir runs/units`, then add --units runs/units"
        )
    if units is not None:
        if "hubert" not in objectives:
            raise ValueError("units are for the objective hubert: add it to --objectives, or leave --units out")
        objectives["hubert"] = units.fill(objectives["hubert"], "objective_options")


def check_units(units: Units | None, folder: str) -> None:
    """Refuse to go on from a model that was trained with other units."""
    if units is not None:
        units.fill((SpeechCLConfig.from_pretrained(folder).objectives or {}).get("hubert", {}), folder)


def check_options(data_args: PretrainingDataArguments, model: SpeechCLForPreTraining, is_new: bool = True) -> None:
    """Refuse options of views, corruptions and labels that no run can have, before any audio is read; of a new run also
    those without effect."""
    for field in ("view_augmentations", "corruptions"):
        probabilities = parse_assignments(getattr(data_args, field), field)
        check_probabilities(probabilities, field)
        if field == "corruptions" and not keeps_time(probabilities):
            raise ValueError("corruptions must keep every sound in its place, so that targets fit: leave out speed")
    prototypical = model.comparing.get("prototypical")
    if prototypical:
        views, needed = prototypical.num_views, prototypical.views_per_class
        if data_args.label_column is None and views < needed:
            raise ValueError(
                f"prototypical.num_views={views}, but without label_column every clip is a class of its own: leave "
                f"num_views out, or make it at least k_shot + 1 = {needed}"
            )
        if views * data_args.clips_per_label < needed:
            raise ValueError(
                f"prototypical.num_views={views} of clips_per_label={data_args.clips_per_label} clips leave no query "
                f"beside k_shot={needed - 1} of a label: raise clips_per_label, or leave num_views out"
            )
    if data_args.corrupt_input and len(model.comparing) == len(model.objectives):
        raise ValueError(
            f"corrupt_input is for objectives on frames; {', '.join(model.comparing)} compare views, which "
            "view_augmentations change: leave it out"
        )
    corrupts = data_args.corrupt_input or model.collator_options().get("corrupt_input")
    if not corrupts and data_args.corruptions != PretrainingDataArguments().corruptions:
        raise ValueError(
            "corruptions are of corrupted input: "
            + (
                "add --corrupt_input, or leave them out"
                if len(model.comparing) < len(model.objectives)
                else f"{', '.join(model.comparing)} compare views, which view_augmentations change"
            )
        )
    if data_args.noise_corpus and not corrupts and not model.comparing:
        raise ValueError("noise_corpus is for views and corrupted input: add --corrupt_input, or leave it out")
    defaults = PretrainingDataArguments()
    if is_new and not model.comparing:
        for name in ("view_seconds", "view_augmentations"):
            if getattr(data_args, name) != getattr(defaults, name):
                raise ValueError(f"{name} is for objectives that compare clips: name one, or leave it out")
    if is_new and data_args.label_column is None and data_args.clips_per_label != defaults.clips_per_label:
        raise ValueError("clips_per_label is of label_column: name one, or leave it out")
    if data_args.label_column is not None and not model.comparing:
        raise ValueError(
            f"label_column={data_args.label_column!r} is for objectives that compare clips (info_nce, siamese, "
            "triplet, prototypical): name one, or leave it out"
        )


def build_augmentation(
    field: str, data_args: PretrainingDataArguments, speech: SpeechDataset, noise: SpeechDataset | None
) -> Augmentation:
    """What the option `field`, view_augmentations or corruptions, asks for; utterances to mix in are of `speech`."""
    probabilities = parse_assignments(getattr(data_args, field), field)
    return Augmentation(probabilities, speech.sampling_rate, tuple(data_args.snr_db), noise, speech)


def build_collator(
    model: SpeechCLForPreTraining, data_args: PretrainingDataArguments, train: SpeechDataset
) -> PretrainingCollator:
    """Batches as the objectives of the model need them."""
    config = model.config
    options = model.collator_options()
    options["corrupt_input"] = bool(options.get("corrupt_input")) or data_args.corrupt_input
    collator = PretrainingCollator(
        config.num_frames,
        mask_prob=data_args.mask_prob,
        mask_span=max(1, round(data_args.mask_span * config.sampling_rate / config.inputs_to_logits_ratio)),
        max_view_samples=round(data_args.view_seconds * config.sampling_rate),
        num_mel_bins=config.num_mel_bins,
        hop_length=config.hop_length,
        **options,
    )
    noise = None
    if data_args.noise_corpus:
        recordings = load_corpus(data_args.noise_corpus, audio_column=data_args.audio_column)
        noise = SpeechDataset(recordings, train.sampling_rate, max_seconds=data_args.max_seconds)
    if collator.num_views:
        collator.view_augmentation = build_augmentation("view_augmentations", data_args, train, noise)
    if collator.corrupt_input:
        collator.corruption = build_augmentation("corruptions", data_args, train, noise)
    return collator


def write_encoder_card(
    trainer: PretrainingTrainer,
    model_args: PretrainingModelArguments,
    data_args: PretrainingDataArguments,
    folder: Path,
    metrics: dict[str, float],
    runtime_seconds: float,
) -> None:
    """Write the model card of a pre-trained encoder beside it."""
    args, config = trainer.args, trainer.model.config
    base_model = None if model_args.encoder in SIZES else model_args.encoder
    began = "" if base_model is None else f", going on from `{source_name(base_model)}`"
    write_card(
        folder,
        config=config,
        title=f"SpeechCL encoder, pre-trained with {' and '.join(config.objectives)}",
        summary="A speech encoder pre-trained on audio without transcripts by hf_speechcl, to be fine-tuned on speech "
        "recognition or classification. It gives a vector for every frame of a recording; it gives no text.",
        usage=USE_ENCODER.replace(
            "{masks}", f"--mask_span {data_args.mask_span:g} --mask_prob {data_args.mask_prob:g}"
        ),
        tags=["self-supervised", "pre-training", *config.objectives],
        pipeline_tag="feature-extraction",
        sources=data_args.corpus,
        methods=methods_of(config.objectives),
        args=args,
        base_model=base_model,
        data=[
            data_row(data_args.corpus, split, data.corpus)
            for split, data in [("train", trainer.train_dataset), ("validation", trainer.eval_dataset)]
        ],
        model=describe_model(config, trainer.model.speechcl.num_parameters()),
        training=f"Objectives{began}, with all their settings:\n\n{describe_objectives(config.objectives)}\n\n"
        f"Masked spans of {data_args.mask_span:g} s, together {data_args.mask_prob:g} of a clip before overlaps. "
        + describe_run(trainer, runtime_seconds),
        results=f"On the validation clips, with fixed masks; collapse guard: {trainer.guard.verdict}.\n\n"
        + metrics_table(metrics),
        limits=describe_limits(trainer.train_dataset.hours, base_model)
        + " The numbers above measure the pre-training task; what an encoder is worth for recognition shows after "
        "fine-tuning.",
    )


def load_probe(
    probe_args: ProbeArguments, audio_column: str, model: SpeechCLForPreTraining
) -> tuple[PhoneProbe, HiddenStates] | None:
    """The clips and the layers that the options of the probe ask for; None without its corpus."""
    if not probe_args.probe_corpus:
        return None
    last = model.config.num_hidden_layers
    layers = probe_args.probe_layers or [round(2 / 3 * last)]
    if wrong := [layer for layer in layers if not 0 <= layer <= last]:
        raise ValueError(f"probe_layers must be between 0 and {last}, found {', '.join(map(str, wrong))}")
    features = HiddenStates(model.speechcl, layers, sampling_rate=model.config.sampling_rate)
    columns = {"audio_column": audio_column}
    columns |= {name: getattr(probe_args, name) for name in ("phones_column", "phone_ends_column")}
    return PhoneProbe.load(
        probe_args.probe_corpus, [probe_args.probe_split], features.sampling_rate, probe_args.probe_clips, columns
    ), features


def check_best_metric(metric: str | None, probe: tuple[PhoneProbe, HiddenStates] | None) -> None:
    """Refuse to choose the best checkpoint by what the probe does not measure."""
    names = layer_names(probe[1].layers) if probe else []
    measured = [f"probe/{name}{key}" for name in names for key in PROBE_METRICS]
    wanted = (metric or "").removeprefix("eval_")
    if wanted.startswith("probe/") and wanted not in measured:
        raise ValueError(f"metric_for_best_model={wanted}: the probe measures {', '.join(measured) or 'nothing'}")


def keep_labelled(corpus: Dataset, split: str) -> Dataset:
    """The clips with a label: one without would be a class of its own, drawn as often as a class of many clips.
    Validation without any stays as it is.

    Raises:
        ValueError: no clip of train has one.
    """
    labelled = [row for row, label in enumerate(column_of(corpus, "label").to_pylist()) if label]
    if len(labelled) == len(corpus) or (not labelled and split != "train"):
        return corpus
    if not labelled:
        raise ValueError(f"no clip of {split} has a label in label_column: leave it out, or name another column")
    logger.warning("%s: %d of %d clips have no label and are left out", split, len(corpus) - len(labelled), len(corpus))
    return corpus.select(labelled)


def build_trainer(
    model_args: PretrainingModelArguments,
    data_args: PretrainingDataArguments,
    args: SpeechTrainingArguments,
    checkpoint: str | None = None,
    probe_args: ProbeArguments | None = None,
) -> PretrainingTrainer:
    """Model, corpus and batches as the options ask for them, ready to train from the beginning or a checkpoint."""
    set_seed(args.seed)
    units = None if data_args.units is None else Units.load(data_args.units)
    model = build_model(model_args, units)
    if checkpoint is not None:
        check_units(units, checkpoint)
    check_options(data_args, model, is_new=checkpoint is None)
    config = model.config
    probe_args = probe_args or ProbeArguments()
    with args.main_process_first(desc="loading the corpus of the probe"):
        probe = load_probe(probe_args, data_args.audio_column, model)
    check_best_metric(args.metric_for_best_model, probe)
    prepare_to_push(args)
    keep_options(args, checkpoint, model_args, data_args, *([probe_args] if probe else []))

    with args.main_process_first(desc="loading the corpus"):
        train, validation = load_train_and_validation(
            data_args.corpus,
            data_args.validation_fraction,
            data_args.train_split,
            data_args.validation_split,
            scored_by=None if data_args.label_column is None else "label",
            audio_column=data_args.audio_column,
            label_column=data_args.label_column,
        )
    if data_args.label_column is not None:
        train, validation = keep_labelled(train, "train"), keep_labelled(validation, "validation")
    datasets = {
        split: SpeechDataset(corpus, config.sampling_rate, args.seed, data_args.max_seconds, data_args.min_seconds)
        for split, corpus in {"train": train, "validation": validation}.items()
    }
    for split, dataset in datasets.items():
        logger.info("%s: %d clips, %.2f hours", split, len(dataset), dataset.hours)
    lookups = {split: None if units is None else units.of_clips(dataset, split) for split, dataset in datasets.items()}

    collator = build_collator(model, data_args, datasets["train"])
    if args.dataloader_num_workers and any(
        used is not None and used.probabilities.get("reverb")
        for used in (collator.view_augmentation, collator.corruption)
    ):
        from ..data.rooms import simulate_rooms

        simulate_rooms(config.sampling_rate)
    for used in (collator.view_augmentation, collator.corruption):
        if used is not None and used.noise is not None and args.dataloader_num_workers == 0:
            used.noise.keep_decoded(args.decoded_gb * 1e9)
    return PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=replace(collator, units=lookups["train"]),
        eval_collator=replace(collator, units=lookups["validation"]),
        max_clips_per_batch=data_args.max_clips_per_batch,
        clips_per_label=data_args.clips_per_label,
        view_seconds=data_args.view_seconds,
        probe=probe,
        max_seconds_per_batch=data_args.max_seconds_per_batch,
        processing_class=Wav2Vec2FeatureExtractor(
            sampling_rate=config.sampling_rate, do_normalize=False, return_attention_mask=True
        ),
    )


@leaves_launch
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, probe_args, args = parse_arguments(ARGUMENTS, DESCRIPTION, argv)
    set_up_logging(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    trainer = build_trainer(model_args, data_args, args, checkpoint, probe_args)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    finish_run(trainer, result.metrics["train_runtime"], partial(write_encoder_card, trainer, model_args, data_args))
