"""Options of the training scripts, as dataclasses."""

import logging
import math
import re
import sys
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from ..cards import LICENSES
from ..command_line import option, parse_assignments
from ..configuration_speechcl import SpeechCLConfig
from ..data.folders import source_name


@dataclass
class SourceArguments:
    _argument_group_name = "corpus"

    corpus: list[str] = option(
        ["demo"],
        "One or more sources: demo (embedded, English), a folder of audio files (with metadata.csv for texts), a "
        "folder of parquet files or one such file, a Hub data set as user/name or user/name:config.",
    )
    audio_column: str = option("audio", "Column with the audio in parquet files and Hub data sets.")
    validation_fraction: float = option(0.05, "Share of clips held out where a source has no validation split.")
    train_split: str = option("train", "Split to train on; in folders, sub-folders named so (see README).")
    validation_split: str = option("validation", "Split to validate on, where a source has it.")


@dataclass
class CorpusArguments(SourceArguments):
    max_seconds_per_batch: float = option(40.0, "Seconds of audio in a batch on one device, padding included.")

    def __post_init__(self):
        if self.max_seconds_per_batch <= 0:
            raise ValueError(f"max_seconds_per_batch must be positive, found {self.max_seconds_per_batch}")


@dataclass
class ClipArguments:
    _argument_group_name = "corpus"

    max_seconds: float = option(15.0, "Longer recordings are split into equal parts of at most this many seconds.")
    min_seconds: float = option(0.4, "Shorter clips are left out.")

    def __post_init__(self):
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, found {self.max_seconds}")


@dataclass
class PretrainingDataArguments(ClipArguments, CorpusArguments):
    max_clips_per_batch: int | None = option(None, "Clips in a batch on one device, beside the limit in seconds.")
    mask_prob: float = option(0.65, "Length of all masked spans together, as a share of the clip; spans may overlap.")
    mask_span: float = option(
        0.2, "Length of a masked span in seconds. Longer spans overlap more, so that they mask less for one mask_prob."
    )
    view_seconds: float = option(
        3.0, "Longest view, for objectives that compare clips; a view is 0.6 to 1 of a clip or of this."
    )
    view_augmentations: list[str] = option(
        ["gain=1.0", "noise=0.3", "reverb=0.2"],
        "What is done to views, with what probability: speed, mix, reverb, noise, band_limit, clipping, gain, drop; "
        "gain=0 for nothing at all.",
    )
    corrupt_input: bool = option(False, "Masked objectives see corrupted input; their targets stay clean.")
    corruptions: list[str] = option(
        ["noise=0.5", "reverb=0.3", "mix=0.2", "band_limit=0.2", "clipping=0.1", "drop=0.2"],
        "What corrupts the input, with what probability; as for views, but for speed.",
    )
    noise_corpus: list[str] = option([], "Sources of noise (as corpus, split train); without, noise is synthetic.")
    snr_db: list[float] = option([5.0, 20.0], "Lowest and highest signal-to-noise ratio of added noise.")
    label_column: str | None = option(
        None,
        "Column with the class of every clip (speaker, keyword, language), for objectives that compare clips; clips "
        "without one are left out, of other objectives too.",
    )
    clips_per_label: int = option(4, "Clips of each label in a batch, with label_column.")
    units: str | None = option(None, "Folder of units, made by scripts/make_units.py, for the objective hubert.")

    def __post_init__(self):
        CorpusArguments.__post_init__(self)
        ClipArguments.__post_init__(self)
        for name in ("mask_prob", "mask_span", "view_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if self.max_clips_per_batch is not None and self.max_clips_per_batch < 1:
            raise ValueError(f"max_clips_per_batch must be positive, found {self.max_clips_per_batch}")
        if self.clips_per_label < 1:
            raise ValueError(f"clips_per_label must be positive, found {self.clips_per_label}")
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db must be two numbers, the lowest and the highest, found {self.snr_db}")
        if self.view_seconds < 0.1:
            raise ValueError(f"view_seconds must be 0.1 at least, found {self.view_seconds}")


@dataclass
class ProbeArguments:
    _argument_group_name = "probe"

    probe_corpus: list[str] = option(
        [],
        "Sources (parquet, Hub) of clips with phones, by which each validation measures a layer: linear probe, ABX.",
    )
    probe_split: str = option("train", "Split of the probe corpus; half of its clips are to fit on, half to test on.")
    probe_layers: list[int] = option([], "Which hidden_states are measured; without, that two thirds up.")
    probe_clips: int = option(60, "Clips that are drawn from the probe corpus, decoded and kept in memory.")
    phones_column: str = option("phones", "Column with a list of each clip's phones.")
    phone_ends_column: str = option("phone_ends", "Column with a list of the phones' ends, in seconds.")

    def __post_init__(self):
        if not self.probe_corpus:
            for name in ("probe_layers", "probe_split", "probe_clips", "phones_column", "phone_ends_column"):
                usual = [] if name == "probe_layers" else self.__dataclass_fields__[name].default
                if getattr(self, name) != usual:
                    raise ValueError(f"{name} is of the clips of probe_corpus: name a source, or leave it out")
        if self.probe_clips < 2:
            raise ValueError(f"probe_clips must be 2 at least, to fit on and to test on, found {self.probe_clips}")


@dataclass
class PretrainingModelArguments:
    _argument_group_name = "model"

    encoder: str = option(
        "tiny",
        "A size (tiny, small, base, large), or a SpeechCL model to go on pre-training from: a folder, user/name or "
        "user/name@revision on the Hub, or starter, the encoder that comes with the package.",
    )
    encoder_options: list[str] = option(
        [], "Fields of SpeechCLConfig to change, e.g. subsampling_factor=2 layerdrop=0.05 (with a size only)."
    )
    objectives: list[str] = option(["best_rq=1.0"], "Objectives with their weights, e.g. best_rq=1.0 wav2vec2=0.5.")
    objective_options: list[str] = option(
        [], "Options of objectives, e.g. best_rq.codebook_size=1024 wav2vec2.temperature=0.2."
    )


BY_OWN_LOOP = "validation adds up sums over its batches, in the precision of training"
IN_SECONDS = "batches are measured in seconds, set max_seconds_per_batch"
BY_LENGTH = "batches are made of clips of like length, in random order"
NOT_USED = {
    "per_device_train_batch_size": IN_SECONDS,
    "per_device_eval_batch_size": IN_SECONDS,
    "train_sampling_strategy": BY_LENGTH,
    "length_column_name": BY_LENGTH,
    "auto_find_batch_size": IN_SECONDS,
    "dataloader_drop_last": "every clip is in a batch",
    "bf16_full_eval": BY_OWN_LOOP,
    "fp16_full_eval": BY_OWN_LOOP,
    "eval_accumulation_steps": BY_OWN_LOOP,
    "prediction_loss_only": BY_OWN_LOOP,
    "batch_eval_metrics": BY_OWN_LOOP,
    "eval_do_concat_batches": BY_OWN_LOOP,
    "eval_use_gather_object": BY_OWN_LOOP,
    "dataloader_in_order": BY_LENGTH,
    "dataloader_multiprocessing_context": "clips are decoded in processes of torch's own choice",
    "remove_unused_columns": "batches are made by our own collators",
    "label_smoothing_factor": "no loss here has labels to smooth",
}


@dataclass
class SpeechTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for speech; batches are measured in seconds instead of clips."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = option("runs/speechcl", "Folder for checkpoints, the model and its card.")
    learning_rate: float = option(5e-4, "Highest learning rate.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls after the warm-up.")
    warmup_steps: float = option(0.1, "Updates of warm-up, or their share of the run if below 1.")
    adam_beta2: float = option(0.98, "Second-moment decay of AdamW; 0.98 is wav2vec 2.0's.")
    weight_decay: float = option(0.01, "Weight decay of AdamW, but for biases and norms.")
    logging_steps: float = option(10, "Updates between two log lines.")
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite from the log; off: the run stops.")
    eval_strategy: str = option("steps", "When to compute the validation loss: no, steps or epoch.")
    eval_steps: float | None = option(200, "Updates between two validations.")
    save_steps: float = option(200, "Updates between two checkpoints.")
    save_total_limit: int | None = option(2, "How many checkpoints are kept.")
    ddp_find_unused_parameters: bool | None = option(False, "Every parameter takes part in every pass: no search.")
    remove_unused_columns: bool = option(False, "Not used: batches are made by our own collators.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder to go on from, or 'last' for the newest in output_dir (a new run if there is none)."
    )

    grad_cache: bool = option(
        True,
        "With gradient accumulation, compare the clips of all micro-batches, encoding their views twice; off: compare "
        "within each micro-batch. For objectives that compare clips.",
    )
    license: str | None = option(
        None, "Licence of the model for its card, as the Hub spells it: apache-2.0, cc-by-4.0, other, …"
    )
    corpus_license: str | None = option(
        None, "Licence of the corpus for the card, of sources that state none by a LICENSE file or their card."
    )
    language: list[str] = option([], "Languages of the corpus for the card, as ISO 639 codes: en, de, …")
    hub_strategy: str = option("end", "When to push to the Hub: end, as the card says what a finished run has found.")
    decoded_gb: float = option(
        2.0,
        "Gigabytes of decoded clips of each split, and of noise, that a process keeps, 115 MB an hour at 16 kHz, so "
        "that they are decoded once; 0 for none. Without effect on the processes of dataloader_num_workers.",
    )
    stop_on_collapse: int = option(
        0, "Stop after so many validations in a row that found a collapse; 0 goes on. Resumed runs count anew."
    )

    def __post_init__(self):
        if self.stop_on_collapse < 0:
            raise ValueError(f"stop_on_collapse must not be negative, found {self.stop_on_collapse}")
        if self.decoded_gb < 0:
            raise ValueError(f"decoded_gb must not be negative, found {self.decoded_gb}")
        for name, reason in NOT_USED.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is not used: {reason}")
        if "schedule_free" in str(self.optim).lower():
            raise ValueError(f"optim={self.optim}: its averaged weights would not be validated, choose another")
        if self.license is not None and self.license not in LICENSES:
            raise ValueError(f"license {self.license!r} is unknown to the Hub: expected {', '.join(sorted(LICENSES))}")
        if unknown := [code for code in self.language if not re.fullmatch("[a-z]{2,3}", code)]:
            raise ValueError(f"language: expected ISO 639 codes such as en, found {', '.join(unknown)}")
        if self.hub_strategy != "end" or self.hub_always_push:
            raise ValueError(
                f"hub_strategy must be end, found {self.hub_strategy!r}"
                f"{' and hub_always_push' if self.hub_always_push else ''}: checkpoints hold pickles and have no card; "
                "resume from those in output_dir"
            )
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not re.search("(loss|error)$", self.metric_for_best_model)
        super().__post_init__()

    def to_dict(self) -> dict:
        """As trackers show it: paths without the folders they are in."""
        shown = super().to_dict()
        return {
            name: source_name(value) if isinstance(value, str) and value.startswith(("/", "~")) else value
            for name, value in shown.items()
        }


def parse_config_options(assignments: list[str], field: str) -> dict:
    """As `parse_assignments`, for fields of `SpeechCLConfig`; an unknown field is refused."""
    options = parse_assignments(assignments, field)
    if unknown := sorted(set(options) - set(SpeechCLConfig.__dataclass_fields__)):
        raise ValueError(f"{field}: SpeechCLConfig has no field {', '.join(unknown)}")
    return options


def parse_objectives(objectives: list[str], options: list[str]) -> dict[str, dict]:
    """The command line's objectives and their options → `SpeechCLConfig.objectives`.

    Raises:
        ValueError: not of the form NAME=WEIGHT, a weight that is no positive number, an option of an absent objective.
    """
    weights = parse_assignments([text if "=" in text else f"{text}=1.0" for text in objectives], "objectives")
    if len(weights) < len(objectives):
        raise ValueError(f"objectives: each may be named once, found {' '.join(objectives)}")
    parsed = {}
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
            raise ValueError(f"objectives: the weight of {name} must be a positive number, found {weight!r}")
        parsed[name] = {"weight": float(weight)}
    for key, value in parse_assignments(options, "objective_options").items():
        name, _, option_name = key.partition(".")
        if name not in parsed or not option_name:
            raise ValueError(
                f"objective_options: expected OBJECTIVE.OPTION=VALUE with one of {', '.join(parsed)}, "
                f"found {key}={value}"
            )
        parsed[name][option_name] = value
    return parsed


class NamesOnly(logging.Filter):
    """Takes the folders from absolute paths in messages: logs are kept in files and shown to others."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+(?=[^\s/])", "", record.getMessage()), ()
        return True


def set_up_logging(args: TrainingArguments) -> None:
    """Log to stderr, names of files without their folders: information from the first process, warnings from all."""
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("hf_speechcl").setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_warning()
    for handler in logging.getLogger().handlers + logging.getLogger("transformers").handlers:
        if not any(isinstance(found, NamesOnly) for found in handler.filters):
            handler.addFilter(NamesOnly())
