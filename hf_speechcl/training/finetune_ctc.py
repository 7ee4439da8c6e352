"""Fine-tune an encoder with a CTC head on transcribed speech."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object
from transformers import AutoConfig, AutoProcessor, set_seed
from transformers.utils import cached_file

from ..cards import (
    CURVES,
    USE_CTC,
    data_row,
    describe_limits,
    describe_model,
    describe_run,
    error_rate_results,
    metrics_table,
    plot_curves,
    write_card,
)
from ..citations import methods_of
from ..command_line import option, parse_arguments
from ..configuration_speechcl import SIZES, SpeechCLConfig
from ..ctc import BLANK, UNKNOWN, WORD_DELIMITER, build_processor, preflight
from ..data import CTCCollator, SpeechDataset
from ..data.corpora import load_train_and_validation
from ..data.folders import source_name
from ..evaluation.asr import SpeechErrorRates
from ..modeling_speechcl import SpeechCLForCTC
from ..objectives import ObjectiveOutput
from ..text import normalize_text
from .arguments import CorpusArguments, SpeechTrainingArguments, parse_config_options, set_up_logging
from .trainer import SpeechTrainer, find_checkpoint, keep_options, prepare_to_push

logger = logging.getLogger(__name__)

DESCRIPTION = """Fine-tune a pre-trained SpeechCL encoder with a CTC head on transcribed speech.

  The model of scripts/pretrain.py on the embedded corpus:
    python scripts/finetune_ctc.py --model runs/demo --output_dir runs/demo-ctc --max_steps 1000
  Your own recordings, a folder with metadata.csv (columns file_name and text):
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --output_dir runs/mine-ctc
  The same model from scratch, for comparison:
    python scripts/finetune_ctc.py --model runs/demo --from_scratch --output_dir runs/scratch-ctc --max_steps 1000

The output folder loads by pipeline("automatic-speech-recognition", model=FOLDER); preflight_train.json
and preflight_validation.json in it list the clips that were left out and why."""


@dataclass
class CTCModelArguments:
    _argument_group_name = "model"

    model: str = option("tiny", "A pre-trained folder or Hub name; or a size (tiny, small, base, large), from scratch.")
    model_options: list[str] = option([], "Fields of SpeechCLConfig to change, e.g. hidden_dropout=0.1.")
    from_scratch: bool = option(False, "Take the architecture of the model only, with new weights, for comparison.")


@dataclass
class CTCDataArguments(CorpusArguments):
    text_column: str = option("text", "Column with the transcript in parquet files, metadata and Hub data sets.")
    text_normalization: str = option("basic", "basic (lower case, no punctuation) or none.")
    max_seconds: float = option(30.0, "Longer clips are left out.")
    mask_time_prob: float = option(0.3, "Length of all masked time spans together, as a share of the clip; 0 for none.")
    mask_time_span: float = option(0.2, "Length of a masked time span in seconds.")
    num_feature_masks: int = option(2, "Bands of mel bins that are masked in a clip; 0 for none.")
    mask_feature_span: int = option(20, "Greatest width of a masked band, in mel bins.")

    def __post_init__(self):
        for name in ("max_seconds", "max_seconds_per_batch", "mask_time_span"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("mask_time_prob", "num_feature_masks", "mask_feature_span"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")


@dataclass
class CTCTrainingArguments(SpeechTrainingArguments):
    output_dir: str = option("runs/ctc", "Folder for checkpoints, the model and its card.")
    learning_rate: float = option(5e-4, "Highest learning rate of the encoder.")
    head_learning_rate: float = option(2e-3, "Highest learning rate of the CTC head.")
    freeze_encoder_steps: float = option(
        0, "Updates in which only the head is trained, or their share of the run if below 1."
    )


def frozen_steps(freeze_encoder_steps: float, num_training_steps: int) -> int:
    """Updates in which only the head is trained; below 1 the option is a share of the run."""
    share = freeze_encoder_steps < 1
    return round(freeze_encoder_steps * num_training_steps) if share else int(freeze_encoder_steps)


class CTCTrainer(SpeechTrainer):
    """Trains a `SpeechCLForCTC`; its one objective, "ctc", counts labels.

    Args:
        references: normalised texts of the validation set.
        kwargs: as for `SpeechTrainer`.
    """

    def __init__(self, *, references: list[str], **kwargs):
        super().__init__(**kwargs)
        self.references = references
        self.hypotheses: list[tuple[int, str]] = []

    def objective_outputs(self, model, inputs):
        index = inputs.pop("index")
        outputs = model(**inputs)
        if not model.training:
            texts = self.processing_class.batch_decode(outputs.logits.argmax(-1))
            self.hypotheses += zip(index.tolist(), texts)
        return {"ctc": ObjectiveOutput(outputs.loss, self.count_items(inputs)["ctc"], {})}

    def count_items(self, inputs):
        return {"ctc": (inputs["labels"] >= 0).sum()}

    def objective_weights(self):
        return {"ctc": 1.0}

    def evaluate(self, *args, **kwargs):
        self.hypotheses = []
        return super().evaluate(*args, **kwargs)

    def summarize(self, sums):
        scalars = super().summarize(sums)
        if not self.model.training:
            hypotheses = dict(gather_object(self.hypotheses))
            self.hypotheses = []
            rates = SpeechErrorRates().compute(
                predictions=[hypotheses.get(index, "") for index in range(len(self.references))],
                references=self.references,
            )
            scalars |= rates
        return scalars

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, bool], list] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((name.startswith("speechcl."), name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate if in_encoder else self.args.head_learning_rate,
                        "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                        "in_encoder": in_encoder,
                    }
                    for (in_encoder, is_decayed), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < frozen_steps(self.args.freeze_encoder_steps, self.state.max_steps):
            # Dropped after the backward pass, as DistributedDataParallel needs every parameter to take part in it.
            for parameter in self.model.speechcl.parameters():
                parameter.grad = None
        return loss


def load_config(model_args: CTCModelArguments) -> SpeechCLConfig:
    """Configuration of the model that the options name; checked before any audio is read."""
    options = parse_config_options(model_args.model_options, "model_options")
    if model_args.model in SIZES:
        return SpeechCLConfig.from_size(model_args.model, **options)
    if not Path(model_args.model).is_dir() and "/" not in model_args.model:
        raise ValueError(f"model {model_args.model!r}: expected {', '.join(SIZES)}, a folder or a Hub name")
    config = AutoConfig.from_pretrained(model_args.model, **options)
    if not isinstance(config, SpeechCLConfig):
        raise ValueError(
            f"{model_args.model} is a {config.model_type} model: expected one that hf_speechcl pre-trained"
        )
    return config


def is_from_scratch(model_args: CTCModelArguments) -> bool:
    return model_args.from_scratch or model_args.model in SIZES


def build_model(model_args: CTCModelArguments, config: SpeechCLConfig, processor) -> SpeechCLForCTC:
    """A CTC model for the vocabulary of a processor, with new weights or with those of a pre-trained encoder."""
    config.vocab_size = len(processor.tokenizer)
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.ctc_loss_reduction = "sum"
    if is_from_scratch(model_args):
        config.objectives = None
        return SpeechCLForCTC(config)
    return SpeechCLForCTC.from_pretrained(model_args.model, config=config)


def write_recognizer_card(
    folder: Path,
    trainer: CTCTrainer,
    model_args: CTCModelArguments,
    data_args: CTCDataArguments,
    metrics: dict[str, float],
    runtime_seconds: float,
) -> None:
    """Write the model card of a fine-tuned model beside it."""
    args, config, tokenizer = trainer.args, trainer.model.config, trainer.processing_class.tokenizer
    origin = "from scratch" if is_from_scratch(model_args) else f"from `{source_name(model_args.model)}`"
    characters = sorted(set(tokenizer.get_vocab()) - {BLANK, UNKNOWN, WORD_DELIMITER})
    validation = trainer.eval_dataset
    rates = {name: metrics[f"eval_{name}"] for name in ("wer", "wer_low", "wer_high", "cer", "cer_low", "cer_high")}
    write_card(
        folder,
        config=config,
        title="SpeechCL speech recogniser (CTC)",
        summary=f"A CTC speech recogniser trained {origin} by hf_speechcl. It writes text of these characters: "
        f"`{' '.join(characters)}`.",
        usage=USE_CTC,
        tags=["automatic-speech-recognition", "ctc"],
        pipeline_tag="automatic-speech-recognition",
        sources=data_args.corpus,
        methods=[*methods_of(config.objectives), "ctc"],
        args=args,
        base_model=None if is_from_scratch(model_args) else model_args.model,
        eval_results=error_rate_results(
            {
                "corpus": [source_name(source) for source in data_args.corpus],
                "split": "validation",
                "clips": len(validation),
                "hours": validation.hours,
                "text_normalization": data_args.text_normalization,
                "decoding": "greedy",
                **rates,
            }
        ),
        data=[
            data_row(data_args.corpus, split, data.corpus)
            for split, data in [("train", trainer.train_dataset), ("validation", validation)]
        ],
        model=describe_model(config, trainer.model.num_parameters()),
        training=f"Trained {origin}; learning rate of the head {args.head_learning_rate:g}, encoder frozen for the "
        f"first {frozen_steps(args.freeze_encoder_steps, trainer.state.max_steps)} updates; time masks "
        f"{data_args.mask_time_prob:g}, mel masks {data_args.num_feature_masks}. Text normalisation: "
        f"{data_args.text_normalization}. "
        + describe_run(
            args,
            data_args.max_seconds_per_batch,
            runtime_seconds,
            trainer.state.global_step,
            trainer.audio_hours,
        ),
        results="At the end of training, on the validation clips; error rates are shares, with bootstrap 95% intervals "
        "(`_low`, `_high`):\n\n" + metrics_table(metrics) + "\n\nError rates with 95% intervals over clips:",
        limits=describe_limits(trainer.train_dataset.hours)
        + " It writes what it was taught to write, without a language model, and makes up words where speech is "
        "unclear: do not rely on it where an error does harm.",
    )


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(
        [CTCModelArguments, CTCDataArguments, CTCTrainingArguments], DESCRIPTION, argv
    )
    set_up_logging(args)
    prepare_to_push(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    normalize_text("", data_args.text_normalization)
    config = load_config(model_args)
    if data_args.mask_feature_span > config.num_mel_bins:
        raise ValueError(
            f"mask_feature_span ({data_args.mask_feature_span}) exceeds the {config.num_mel_bins} mel bins"
        )
    keep_options(args, checkpoint, model_args, data_args)

    with args.main_process_first(desc="loading the corpus"):
        corpora = load_train_and_validation(
            data_args.corpus,
            data_args.validation_fraction,
            data_args.train_split,
            data_args.validation_split,
            audio_column=data_args.audio_column,
            text_column=data_args.text_column,
            require_text=True,
        )
    texts = [
        [None if text is None else normalize_text(text, data_args.text_normalization) for text in corpus["text"]]
        for corpus in corpora
    ]
    is_recognizer = not is_from_scratch(model_args) and cached_file(
        model_args.model, "vocab.json", _raise_exceptions_for_missing_entries=False
    )
    if is_recognizer:
        processor = AutoProcessor.from_pretrained(model_args.model)
    else:
        processor = build_processor([text for text in texts[0] if text], config.sampling_rate)

    set_seed(args.seed)
    model = build_model(model_args, config, processor)
    frame_length = model._get_feat_extract_output_lengths
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    datasets, labels, references = [], [], []
    for name, corpus, corpus_texts in zip(("train", "validation"), corpora, texts):
        kept, report = preflight(
            corpus, corpus_texts, processor.tokenizer, frame_length, config.sampling_rate, data_args.max_seconds
        )
        logger.info("%s, %s", name, report)
        report.save(output_dir / f"preflight_{name}.json")
        if not kept:
            raise ValueError(f"no clip of {name} can be trained on: see {output_dir / f'preflight_{name}.json'}")
        datasets.append(SpeechDataset(corpus.select(kept), config.sampling_rate, args.seed, min_seconds=0))
        references.append([corpus_texts[row] for row in kept])
        labels.append(processor.tokenizer(references[-1]).input_ids)

    span = max(1, round(data_args.mask_time_span * config.sampling_rate / config.inputs_to_logits_ratio))
    if not data_args.mask_time_prob:
        model.speechcl.masked_spec_embed.requires_grad_(False)
    trainer = CTCTrainer(
        model=model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        references=references[1],
        data_collator=CTCCollator(
            frame_length,
            labels[0],
            mask_time_prob=data_args.mask_time_prob,
            mask_time_span=span,
            num_mel_bins=config.num_mel_bins,
            num_feature_masks=data_args.num_feature_masks,
            mask_feature_span=data_args.mask_feature_span,
        ),
        eval_collator=CTCCollator(frame_length, labels[1]),
        max_seconds_per_batch=data_args.max_seconds_per_batch,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return

    plot_curves({"": trainer.state.log_history}, output_dir / CURVES)
    (output_dir / "results.json").write_text(json.dumps(metrics, indent=2))
    write_recognizer_card(output_dir, trainer, model_args, data_args, metrics, result.metrics["train_runtime"])
    logger.info("model, processor, card and curves are in %s", source_name(args.output_dir))
    if args.push_to_hub:
        logger.info("published: %s", trainer.push_to_hub())
