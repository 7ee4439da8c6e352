"""Fine-tune an encoder with a classification head: speaker, language, keyword."""

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from accelerate.utils import gather_object
from huggingface_hub import EvalResult
from torch import nn
from transformers import Wav2Vec2FeatureExtractor, set_seed

from ..cards import (
    USE_CLASSIFIER,
    data_row,
    data_set_fields,
    describe_limits,
    describe_model,
    describe_run,
    metrics_table,
    write_card,
)
from ..citations import methods_of
from ..command_line import option, parse_arguments
from ..configuration_speechcl import SpeechCLConfig
from ..data import ClassificationCollator, SpeechDataset
from ..data.corpora import load_train_and_validation
from ..data.folders import source_name
from ..distributed import leaves_launch
from ..evaluation.classification import classification_rates
from ..modeling_speechcl import SpeechCLForSequenceClassification
from ..objectives import ObjectiveOutput
from .arguments import ClipArguments, CorpusArguments, set_up_logging
from .finetuning import (
    FineTuningArguments,
    FineTuningModelArguments,
    FineTuningTrainer,
    RegularizationArguments,
    build_model,
    check_frozen_share,
    choose_trained,
    describe_finetuning,
    load_config,
)
from .resume import find_checkpoint, keep_options
from .trainer import finish_run, prepare_to_push

logger = logging.getLogger(__name__)

DESCRIPTION = """Fine-tune a pre-trained SpeechCL encoder to name the class of a clip: speaker, language, keyword.

  A folder with metadata.csv (columns file_name and keyword):
    python scripts/finetune_classifier.py --model runs/mine --corpus my_keywords --label_column keyword
  Speakers of a corpus whose validation split has others: hold out clips of the training split instead:
    python scripts/finetune_classifier.py --model runs/mine --corpus my_audio --label_column speaker \\
      --validation_split none --validation_fraction 0.1
  The encoder as it is, with a head on a weighted mean of its layers:
    python scripts/finetune_classifier.py --model runs/mine --corpus my_keywords --label_column keyword \\
      --freeze_encoder_steps -1 --weighted_layer_sum True

The output folder loads by pipeline("audio-classification", model=FOLDER)."""


@dataclass
class ClassifierDataArguments(RegularizationArguments, ClipArguments, CorpusArguments):
    label_column: str = option("label", "Column with the class of every clip.")

    def __post_init__(self):
        RegularizationArguments.__post_init__(self)
        CorpusArguments.__post_init__(self)
        ClipArguments.__post_init__(self)


@dataclass
class ClassifierTrainingArguments(FineTuningArguments):
    output_dir: str = option("runs/classifier", "Folder for checkpoints, the model and its card.")
    metric_for_best_model: str | None = option("accuracy", "Validation metric that the best checkpoint is chosen by.")

    def __post_init__(self):
        if self.stop_on_collapse:
            raise ValueError("stop_on_collapse is not used: no guard watches a classifier")
        super().__post_init__()


class ClassificationTrainer(FineTuningTrainer):
    """Trains a `SpeechCLForSequenceClassification`; its one objective, "classification", counts clips.

    Args:
        references: class of every clip of the validation set.
        kwargs: as for `SpeechTrainer`.
    """

    def __init__(self, *, references: list[int], **kwargs):
        super().__init__(**kwargs)
        self.references = references
        self.predictions: list[tuple[int, int]] = []

    def objective_outputs(self, model, inputs):
        index, labels = inputs.pop("index"), inputs.pop("labels")
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        if not model.training:
            self.predictions += zip(index.tolist(), logits.argmax(-1).tolist())
        hits = ((logits.argmax(-1) == labels) & (labels >= 0)).sum()
        return {"classification": ObjectiveOutput(loss, (labels >= 0).sum(), {"hits": hits})}

    def count_items(self, inputs):
        return {"classification": (inputs["labels"] >= 0).sum()}

    def objective_weights(self):
        return {"classification": 1.0}

    def summarize_metrics(self, name, output, num_items):
        return {"accuracy": output.metrics["hits"].item() / max(num_items, 1)}

    def evaluate(self, *args, **kwargs):
        self.predictions = []
        return super().evaluate(*args, **kwargs)

    def summarize(self, sums):
        scalars = super().summarize(sums)
        if self.is_validating:
            found = dict(gather_object(self.predictions))
            self.predictions = []
            # A clip that could not be decoded counts as an error.
            predictions = [found.get(index, -1) for index in range(len(self.references))]
            scalars |= classification_rates(predictions, self.references)
        return scalars


def class_names(
    model_args: FineTuningModelArguments, config: SpeechCLConfig, labels: list[str | None], field: str
) -> list[str]:
    """The classes to tell apart: those of a classifier that is fine-tuned further, or those of the training clips.

    Raises:
        ValueError: fewer than two.
    """
    is_classifier = SpeechCLForSequenceClassification.__name__ in (config.architectures or [])
    if is_classifier and not model_args.is_from_scratch:
        return [config.id2label[number] for number in range(config.num_labels)]
    names = sorted({label for label in labels if label})
    if len(names) < 2:
        raise ValueError(f"label_column={field!r}: expected two classes at least, found {', '.join(names) or 'none'}")
    return names


def keep_known(corpus: datasets.Dataset, names: list[str], split: str) -> datasets.Dataset:
    """The rows whose label is among `names`; the others are logged.

    Raises:
        ValueError: none is left; says what to do.
    """
    labels = corpus["label"]
    known = set(names)
    unknown = Counter(label or "(none)" for label in labels if label not in known)
    if unknown:
        listed = ", ".join(f"{label} ({count})" for label, count in unknown.most_common(10))
        logger.warning(
            "%s: %d of %d clips have no label to learn and are left out: %s",
            split,
            sum(unknown.values()),
            len(labels),
            listed,
        )
    if sum(unknown.values()) == len(labels):
        remedy = (
            "the model is a classifier of these: for others give the encoder that it was made from"
            if split == "train"
            else "if its classes are others by design, hold out training clips with --validation_split none"
        )
        raise ValueError(f"no clip of {split} has a label among the {len(names)} to tell apart: {remedy}")
    return corpus.select([row for row, label in enumerate(labels) if label in known])


def write_classifier_card(
    trainer: ClassificationTrainer,
    model_args: FineTuningModelArguments,
    data_args: ClassifierDataArguments,
    folder: Path,
    metrics: dict[str, float],
    runtime_seconds: float,
) -> None:
    """Write the model card of a classifier beside it."""
    args, config = trainer.args, trainer.model.config
    names = [config.id2label[number] for number in range(config.num_labels)]
    listed = ", ".join(f"`{name}`" for name in names[:30]) + (" …" if len(names) > 30 else "")
    write_card(
        folder,
        config=config,
        title=f"SpeechCL classifier ({data_args.label_column})",
        summary=f"A classifier of speech clips trained {model_args.origin} by hf_speechcl. It tells {len(names)} "
        f"classes apart: {listed}.",
        usage=USE_CLASSIFIER,
        tags=["audio-classification"],
        pipeline_tag="audio-classification",
        sources=data_args.corpus,
        methods=methods_of(config.objectives),
        args=args,
        base_model=model_args.base_model,
        eval_results=[
            EvalResult(
                task_type="audio-classification",
                **data_set_fields(list(map(source_name, data_args.corpus))),
                dataset_split="validation",
                metric_type=metric,
                metric_name=name.replace("_", "-averaged ").replace("f1", "F1"),
                metric_value=round(100 * metrics[f"eval_{name}"], 2),
                metric_args={
                    "clips": len(trainer.eval_dataset),
                    "hours": round(trainer.eval_dataset.hours, 3),
                    "interval_95": [round(100 * metrics[f"eval_{name}_{end}"], 2) for end in ("low", "high")],
                },
            )
            for name, metric in (("accuracy", "accuracy"), ("macro_f1", "f1"))
        ],
        data=[
            data_row(data_args.corpus, split, data.corpus)
            for split, data in [("train", trainer.train_dataset), ("validation", trainer.eval_dataset)]
        ],
        model=describe_model(config, trainer.model.num_parameters()),
        training=f"{describe_finetuning(trainer, model_args, data_args)} " + describe_run(trainer, runtime_seconds),
        results="On the validation clips, with bootstrap 95% intervals (`_low`, `_high`); `majority` is the accuracy "
        f"of always naming the most frequent class, chance is {1 / len(names):.3g}.\n\n" + metrics_table(metrics),
        limits=describe_limits(trainer.train_dataset.hours, model_args.base_model)
        + " It names one of its classes for any sound.",
    )


@leaves_launch
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(
        [FineTuningModelArguments, ClassifierDataArguments, ClassifierTrainingArguments], DESCRIPTION, argv
    )
    set_up_logging(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    check_frozen_share(args, checkpoint)
    config = load_config(model_args)
    regularization = data_args.regularization(config)
    prepare_to_push(args)
    keep_options(args, checkpoint, model_args, data_args)

    with args.main_process_first(desc="loading the corpus"):
        corpora = load_train_and_validation(
            data_args.corpus,
            data_args.validation_fraction,
            data_args.train_split,
            data_args.validation_split,
            audio_column=data_args.audio_column,
            label_column=data_args.label_column,
            scored_by="label",
        )
    names = class_names(model_args, config, corpora[0]["label"], data_args.label_column)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    corpora = [keep_known(corpus, names, split) for corpus, split in zip(corpora, ("train", "validation"))]
    clips = [
        SpeechDataset(corpus, config.sampling_rate, args.seed, data_args.max_seconds, data_args.min_seconds)
        for corpus in corpora
    ]
    labels = [
        np.array([config.label2id[label] for label in corpus["label"]])[dataset.rows].tolist()
        for corpus, dataset in zip(corpora, clips)
    ]
    for split, dataset in zip(("train", "validation"), clips):
        logger.info("%s: %d clips, %.2f hours, %d classes", split, len(dataset), dataset.hours, len(names))

    set_seed(args.seed)
    model = build_model(SpeechCLForSequenceClassification, model_args, config)
    tuner = choose_trained(model, model_args, args, data_args.mask_time_prob > 0)
    frame_length = config.num_frames
    trainer = ClassificationTrainer(
        model=model,
        args=args,
        train_dataset=clips[0],
        eval_dataset=clips[1],
        references=labels[1],
        data_collator=ClassificationCollator(frame_length, labels[0], **regularization),
        eval_collator=ClassificationCollator(frame_length, labels[1]),
        max_seconds_per_batch=data_args.max_seconds_per_batch,
        processing_class=Wav2Vec2FeatureExtractor(
            sampling_rate=config.sampling_rate, do_normalize=False, return_attention_mask=True
        ),
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if tuner is not None:
        tuner.merge_and_unload(safe_merge=True)
    finish_run(trainer, result.metrics["train_runtime"], partial(write_classifier_card, trainer, model_args, data_args))
