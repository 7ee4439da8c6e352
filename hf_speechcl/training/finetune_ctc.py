"""Fine-tune an encoder with a CTC head on transcribed speech."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets
from transformers import AutoProcessor, Wav2Vec2Processor, set_seed
from transformers.utils import cached_file

from ..cards import (
    USE_CTC,
    data_row,
    describe_limits,
    describe_model,
    describe_run,
    error_rate_results,
    metrics_table,
    write_card,
)
from ..citations import methods_of
from ..command_line import option, parse_arguments
from ..ctc import BLANK, UNKNOWN, VOCABULARIES, WORD_DELIMITER, build_processor, preflight
from ..data import CTCCollator, SpeechDataset
from ..data.corpora import load_train_and_validation
from ..data.folders import source_name
from ..data.pseudo_labels import PseudoLabels, load_pseudo_labels
from ..distributed import leaves_launch
from ..modeling_speechcl import SpeechCLForCTC
from ..text_policy import TextPolicy, apply_policy
from .arguments import CorpusArguments, set_up_logging
from .ctc_trainer import CTCTrainer, CTCTrainingArguments
from .finetuning import (
    FineTuningModelArguments,
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

DESCRIPTION = """Fine-tune a pre-trained SpeechCL encoder with a CTC head on transcribed speech.

  The model of scripts/pretrain.py on the embedded corpus:
    python scripts/finetune_ctc.py --model runs/demo --output_dir runs/demo-ctc --max_steps 1000
  Your own recordings, minutes of them, a folder with metadata.csv (columns file_name and text):
    python scripts/finetune_ctc.py --config scripts/configs/cpu-ctc.yaml --model runs/mine --corpus my_labelled_audio \\
      --output_dir runs/mine-ctc
  Learn from more audio, which the model above has transcribed:
    python scripts/make_pseudo_labels.py --model runs/mine-ctc --corpus my_audio --output_dir runs/pseudo
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --pseudo_labels runs/pseudo \\
      --output_dir runs/mine-ctc2
  The same model from scratch, for comparison:
    python scripts/finetune_ctc.py --model runs/demo --from_scratch --output_dir runs/scratch-ctc --max_steps 1000
  Pieces of words in place of characters; text with capitals and punctuation, numbers in words:
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --vocabulary unigram --vocab_size 500
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --casing keep --punctuation keep \\
      --digits words
  Less of the model learns: lower layers slower; adapters only; the head only, on a weighted mean of all layers:
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --layer_decay 0.9
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --lora_rank 8
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --freeze_encoder_steps -1 \\
      --weighted_layer_sum True

The output folder loads by pipeline("automatic-speech-recognition", model=FOLDER). In it, preflight_train.json and
preflight_validation.json list the clips that were left out and why, text_train.json and text_validation.json what was
changed in the texts."""


@dataclass
class CTCDataArguments(RegularizationArguments, CorpusArguments):
    text_column: str = option("text", "Column with the transcript in parquet files, metadata and Hub data sets.")
    pseudo_labels: list[str] = option(
        [],
        "Folders of scripts/make_pseudo_labels.py: learnt from beside the corpus, but for the vocabulary. Clips of the "
        "corpus with a transcript, known by file name and length, are left out.",
    )
    casing: str | None = option(None, "Of the text that is learnt: lower, upper or keep; lower by default.")
    punctuation: str | None = option(None, "remove (but for apostrophes within words) or keep; remove by default.")
    digits: str | None = option(
        None,
        "keep, words (four for 4; clips whose text has ½ or ² are left out) or leave_out (clips whose text has "
        "digits); keep by default.",
    )
    text_language: str | None = option(None, "Language of the words for numbers, as num2words names it; en by default.")
    vocabulary: str | None = option(
        None, "characters, or pieces of words: unigram or bpe; characters by default. A recogniser keeps its own."
    )
    vocab_size: int | None = option(None, "Number of pieces, blank and unknown among them; 256 by default.")
    max_seconds: float = option(30.0, "Longer clips are left out.")

    def __post_init__(self):
        RegularizationArguments.__post_init__(self)
        CorpusArguments.__post_init__(self)
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, found {self.max_seconds}")
        if self.vocabulary is not None and self.vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary must be {', '.join(VOCABULARIES)}, found {self.vocabulary!r}")
        if self.vocab_size is not None and self.vocabulary not in ("unigram", "bpe"):
            raise ValueError(
                f"vocab_size={self.vocab_size} is for vocabularies of pieces: add --vocabulary unigram or bpe, or "
                "leave it out"
            )


ARGUMENTS = (FineTuningModelArguments, CTCDataArguments, CTCTrainingArguments)


def text_policy(data_args: CTCDataArguments, earlier: dict | None) -> TextPolicy:
    """What the options say, over what the recogniser that is fine-tuned further was trained with, over the defaults."""
    options = {
        "casing": data_args.casing,
        "punctuation": data_args.punctuation,
        "digits": data_args.digits,
        "language": data_args.text_language,
    }
    given = {name: value for name, value in options.items() if value is not None}
    policy = TextPolicy(**{**(earlier or {}), **given})
    if data_args.text_language is not None and policy.digits != "words":
        raise ValueError(f"text_language={data_args.text_language} is for digits=words: add --digits words")
    return policy


def check_pseudo_labels(pseudo_labels: list[PseudoLabels], policy: TextPolicy, sampling_rate: int) -> None:
    """Refuse texts of a recogniser with another text policy, and warn of audio that it heard at a lower rate."""
    for labels in pseudo_labels:
        name, theirs = source_name(str(labels.folder)), labels.description["text_policy"]
        if theirs is not None and (changed := [key for key, own in policy.to_dict().items() if theirs.get(key) != own]):
            shown = ", ".join(f"{key} {theirs.get(key)} (now {policy.to_dict()[key]})" for key in changed)
            raise ValueError(
                f"pseudo_labels: the recogniser that wrote {name} was trained with {shown}: give these options here, "
                "or let another recogniser write the texts"
            )
        if labels.description["sampling_rate"] < sampling_rate:
            logger.warning(
                "%s holds audio of %d Hz, and the model hears %d Hz: what is above half of the former is missing in it",
                name,
                labels.description["sampling_rate"],
                sampling_rate,
            )


def is_recognizer(model_args: FineTuningModelArguments) -> bool:
    """Whether the model has a vocabulary already."""
    return not model_args.is_from_scratch and bool(
        cached_file(model_args.folder, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    )


def prepare_processor(
    model_args: FineTuningModelArguments,
    data_args: CTCDataArguments,
    args: CTCTrainingArguments,
    texts: list[str],
    sampling_rate: int,
    checkpoint: str | None,
) -> Wav2Vec2Processor:
    """The processor of the checkpoint, of the recogniser that is fine-tuned further, or one for `texts`."""
    if checkpoint is not None:
        return AutoProcessor.from_pretrained(checkpoint)
    if is_recognizer(model_args):
        return AutoProcessor.from_pretrained(model_args.folder)
    with args.main_process_first(local=False, desc="making the vocabulary"):
        if args.process_index:
            return AutoProcessor.from_pretrained(args.output_dir)
        processor = build_processor(
            texts, sampling_rate, data_args.vocabulary or "characters", data_args.vocab_size or 256
        )
        processor.save_pretrained(args.output_dir)
        return processor


def write_recognizer_card(
    trainer: CTCTrainer,
    model_args: FineTuningModelArguments,
    data_args: CTCDataArguments,
    pseudo_labels: list[PseudoLabels],
    num_true: int,
    folder: Path,
    metrics: dict[str, float],
    runtime_seconds: float,
) -> None:
    """Write the model card of a fine-tuned model beside it. The first `num_true` of its training clips have true
    transcripts."""
    args, config, tokenizer = trainer.args, trainer.model.config, trainer.processing_class.tokenizer
    tokens = sorted(set(tokenizer.get_vocab()) - {BLANK, UNKNOWN, WORD_DELIMITER})
    kind = "characters" if all(len(token) == 1 for token in tokens) else "pieces"
    # transformers' pipeline has timestamps of characters and words only where the vocabulary is of characters.
    usage = USE_CTC if kind == "characters" else USE_CTC.replace(', return_timestamps="word"', "")
    letters = f"these characters: `{' '.join(tokens)}`" if kind == "characters" else f"{len(tokens)} pieces of words"
    validation, policy = trainer.eval_dataset, str(TextPolicy(**config.text_policy))
    train = trainer.train_dataset.corpus
    data = [data_row(data_args.corpus, "train", train.select(range(num_true)))]
    if pseudo_labels:
        written = train.select(range(num_true, len(train)))
        data.append(data_row(data_args.pseudo_labels, "train, pseudo-labels", written))
    written_by_machine = "".join(
        f"The texts of `{source_name(str(labels.folder))}` (audio of {', '.join(labels.description['corpus'])}) were "
        f"written by the recogniser `{labels.description['recognizer']}`. "
        for labels in pseudo_labels
    )
    rates = {name: metrics[f"eval_{name}"] for name in ("wer", "wer_low", "wer_high", "cer", "cer_low", "cer_high")}
    write_card(
        folder,
        config=config,
        title="SpeechCL speech recogniser (CTC)",
        summary=f"A CTC speech recogniser trained {model_args.origin} by hf_speechcl. It writes text of {letters}.",
        usage=usage,
        tags=["automatic-speech-recognition", "ctc"],
        pipeline_tag="automatic-speech-recognition",
        sources=[*data_args.corpus, *data_args.pseudo_labels],
        methods=[*methods_of(config.objectives), "ctc", *(["pseudo_labels"] if pseudo_labels else [])],
        args=args,
        base_model=model_args.base_model,
        eval_results=error_rate_results(
            {
                "corpus": [source_name(source) for source in data_args.corpus],
                "split": "validation",
                "clips": len(validation),
                "hours": validation.hours,
                "text_normalization": policy,
                "decoding": "greedy",
                **rates,
            }
        ),
        data=[*data, data_row(data_args.corpus, "validation", validation.corpus)],
        model=describe_model(config, trainer.model.num_parameters()),
        training=f"{describe_finetuning(trainer, model_args, data_args)} {written_by_machine}Text: {policy}. "
        + describe_run(trainer, runtime_seconds),
        results="On the validation clips; error rates are shares, with bootstrap 95% intervals "
        "(`_low`, `_high`):\n\n" + metrics_table(metrics) + "\n\nError rates with 95% intervals over clips:",
        limits=describe_limits(trainer.train_dataset.hours, model_args.base_model)
        + " It writes what it was taught to write, without a language model, and makes up words where speech is "
        "unclear: do not rely on it where an error does harm.",
    )


@leaves_launch
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(ARGUMENTS, DESCRIPTION, argv)
    set_up_logging(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    check_frozen_share(args, checkpoint)
    config = load_config(model_args)
    regularization = data_args.regularization(config)
    policy = text_policy(data_args, config.text_policy if is_recognizer(model_args) else None)
    pseudo_labels = [PseudoLabels.load(folder) for folder in data_args.pseudo_labels]
    check_pseudo_labels(pseudo_labels, policy, config.sampling_rate)
    if data_args.vocabulary is not None and is_recognizer(model_args):
        raise ValueError(
            f"vocabulary={data_args.vocabulary}, but {model_args.model} is a recogniser with a vocabulary: leave it "
            "out, or fine-tune the encoder that it was made from"
        )
    prepare_to_push(args)
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
            scored_by="text",
        )
        num_transcribed = len(corpora[0])
        if pseudo_labels:
            has_text = np.flatnonzero([bool(text) for text in corpora[0]["text"]])
            written = load_pseudo_labels(pseudo_labels, concatenate_datasets([corpora[0].select(has_text), corpora[1]]))
            corpora = (concatenate_datasets([corpora[0], written]), corpora[1])
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    texts, left_out = [], []
    for name, corpus in zip(("train", "validation"), corpora):
        as_written = corpus["text"]
        changed, report = apply_policy(policy, as_written)
        logger.info("%s, %s", name, report)
        report.save(output_dir / f"text_{name}.json")
        texts.append(changed)
        left_out.append(
            {row: ("digits", text) for row, text in enumerate(as_written) if text and policy.leaves_out(text)}
        )
    learnt = [text for row, text in enumerate(texts[0][:num_transcribed]) if text and row not in left_out[0]]
    processor = prepare_processor(model_args, data_args, args, learnt, config.sampling_rate, checkpoint)

    set_seed(args.seed)
    config.text_policy = policy.to_dict()
    config.vocab_size = len(processor.tokenizer)
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.ctc_loss_reduction = "sum"
    model = build_model(SpeechCLForCTC, model_args, config)
    tuner = choose_trained(model, model_args, args, data_args.mask_time_prob > 0)
    frame_length = config.num_frames
    datasets, labels, references = [], [], []
    for split, name in enumerate(("train", "validation")):
        kept, kept_labels, report = preflight(
            corpora[split],
            texts[split],
            processor.tokenizer,
            frame_length,
            config.sampling_rate,
            data_args.max_seconds,
            left_out[split],
        )
        logger.info("%s, %s", name, report)
        report.save(output_dir / f"preflight_{name}.json")
        if not kept:
            raise ValueError(f"no clip of {name} can be trained on: see {output_dir / f'preflight_{name}.json'}")
        if name == "train":
            num_true = sum(row < num_transcribed for row in kept)
            if pseudo_labels and num_true == len(kept):
                raise ValueError(
                    f"no clip of pseudo_labels can be trained on: see {output_dir / 'preflight_train.json'}"
                )
        datasets.append(SpeechDataset(corpora[split].select(kept), config.sampling_rate, args.seed, min_seconds=0))
        labels.append(kept_labels)
        references.append([texts[split][row] for row in kept])

    trainer = CTCTrainer(
        model=model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        references=references[1],
        data_collator=CTCCollator(frame_length, labels[0], **regularization),
        eval_collator=CTCCollator(frame_length, labels[1]),
        max_seconds_per_batch=data_args.max_seconds_per_batch,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if tuner is not None:
        tuner.merge_and_unload(safe_merge=True)
    write = partial(write_recognizer_card, trainer, model_args, data_args, pseudo_labels, num_true)
    finish_run(trainer, result.metrics["train_runtime"], write)
