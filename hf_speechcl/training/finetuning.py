"""What fine-tuning has in common, whatever the head: options, the model, and its trainer."""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..command_line import option
from ..configuration_speechcl import SIZES, SpeechCLConfig
from ..data.folders import source_name
from ..hub import find_model, may_be_model, read_config
from ..modeling_speechcl import SpeechCLHeadModel
from .arguments import SpeechTrainingArguments, parse_config_options
from .lora import add_lora, check_targets, import_peft
from .trainer import SpeechTrainer

logger = logging.getLogger(__name__)


@dataclass
class FineTuningModelArguments:
    _argument_group_name = "model"

    model: str = option(
        "tiny",
        "A pre-trained folder, or user/name or user/name@revision on the Hub; starter, the encoder that comes with the "
        "package; or a size (tiny, small, base, large), from scratch.",
    )
    model_options: list[str] = option([], "Fields of SpeechCLConfig to change, e.g. hidden_dropout=0.1.")
    from_scratch: bool = option(False, "Take the architecture of the model only, with new weights, for comparison.")
    weighted_layer_sum: bool = option(False, "The head sees a learned weighted mean of all layers, not just the last.")
    lora_rank: int = option(0, "Train adapters of this rank in place of the encoder's weights (LoRA); 0 for none.")
    lora_alpha: float | None = option(None, "What adapters add is scaled by lora_alpha / lora_rank; twice the rank.")
    lora_targets: list[str] = option(
        ["q_proj", "v_proj"], "Layers with adapters, of q_proj, k_proj, v_proj, o_proj, up_proj, down_proj."
    )

    def __post_init__(self):
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, found {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, found {self.lora_alpha}")
        check_targets(self.lora_targets)
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets != ["q_proj", "v_proj"]):
            raise ValueError("lora_alpha and lora_targets do nothing without lora_rank: give it, or leave them out")
        if self.lora_rank:
            import_peft()
            if self.is_from_scratch:
                raise ValueError("lora_rank adapts a pre-trained encoder: leave it out, or name one with model")

    @property
    def folder(self) -> str:
        """Where the model is, downloaded if it is on the Hub."""
        return find_model(self.model)

    @property
    def is_from_scratch(self) -> bool:
        return self.from_scratch or self.model in SIZES

    @property
    def base_model(self) -> str | None:
        """The model whose weights it begins with."""
        return None if self.is_from_scratch else self.model

    @property
    def origin(self) -> str:
        """What its weights began as, in words."""
        return "from scratch" if self.is_from_scratch else f"from `{source_name(self.model)}`"


@dataclass
class RegularizationArguments:
    max_shift: float = option(
        0.04,
        "Up to so many seconds are put before a clip, so that frames do not always begin where clips do; 0 for none.",
    )
    mask_time_prob: float = option(
        0.3, "Length of all masked time spans together, as a share of the clip, of one span at least; 0 for none."
    )
    mask_time_span: float = option(0.2, "Length of a masked time span in seconds.")
    num_feature_masks: int = option(2, "Bands of mel bins that are masked in a clip; 0 for none.")
    mask_feature_span: int = option(20, "Greatest width of a masked band, in mel bins.")

    def __post_init__(self):
        if self.mask_time_span <= 0:
            raise ValueError(f"mask_time_span must be positive, found {self.mask_time_span}")
        for name in ("max_shift", "mask_time_prob", "num_feature_masks", "mask_feature_span"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")

    def regularization(self, config: SpeechCLConfig) -> dict[str, float]:
        """Options of a collator of training batches.

        Raises:
            ValueError: a band wider than all mel bins.
        """
        if self.num_feature_masks and self.mask_feature_span > config.num_mel_bins:
            raise ValueError(f"mask_feature_span ({self.mask_feature_span}) exceeds the {config.num_mel_bins} mel bins")
        return {
            "max_shift": round(self.max_shift * config.sampling_rate),
            "mask_time_prob": self.mask_time_prob,
            "mask_time_span": max(1, round(self.mask_time_span * config.sampling_rate / config.inputs_to_logits_ratio)),
            "num_mel_bins": config.num_mel_bins,
            "num_feature_masks": self.num_feature_masks,
            "mask_feature_span": self.mask_feature_span,
        }


@dataclass
class FineTuningArguments(SpeechTrainingArguments):
    learning_rate: float = option(5e-4, "Highest learning rate of the encoder.")
    head_learning_rate: float = option(2e-3, "Highest learning rate of the head.")
    layer_decay: float = option(
        1.0, "Each layer's learning rate as a share of that of the layer above; the front end's is lowest."
    )
    freeze_encoder_steps: float = option(
        0, "Updates in which only the head is trained, or their share of the run if below 1; -1 for all."
    )
    load_best_model_at_end: bool | None = option(
        None, "Take the best checkpoint instead of the last; by default if every checkpoint is of a validation."
    )

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, found {self.layer_decay}")
        if self.freeze_encoder_steps < 0 and self.freeze_encoder_steps != -1:
            raise ValueError(f"freeze_encoder_steps must not be negative but for -1, found {self.freeze_encoder_steps}")
        if not self.grad_cache:
            raise ValueError("grad_cache is not used: no clips are compared with each other")
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self._validates_what_it_saves()
        super().__post_init__()

    def _validates_what_it_saves(self) -> bool:
        evaluates, saves = IntervalStrategy(self.eval_strategy), SaveStrategy(self.save_strategy)
        if IntervalStrategy.NO == evaluates or SaveStrategy.NO == saves:
            return False
        if evaluates == IntervalStrategy.STEPS and saves == SaveStrategy.STEPS:
            every = self.eval_steps or self.logging_steps
            return self.save_steps == every or (every >= 1 and self.save_steps >= 1 and self.save_steps % every == 0)
        return saves == SaveStrategy.BEST or evaluates.value == saves.value


def check_frozen_share(args: FineTuningArguments, checkpoint: str | None) -> None:
    """Refuse to go on with a run of another length, where the encoder is frozen for a share of it: it may be trained
    already, and would be frozen again. Lengths in epochs are compared as whole ones, which checkpoints tell.

    Raises:
        ValueError: names both lengths.
    """
    if checkpoint is None or not 0 < args.freeze_encoder_steps < 1:
        return
    state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    length = math.ceil(getattr(args, name))
    if state[name] != length:
        raise ValueError(
            f"freeze_encoder_steps={args.freeze_encoder_steps} is a share of the run, whose {name} was {state[name]} "
            f"and is {length} now: go on with the same, or begin anew"
        )


def frozen_steps(freeze_encoder_steps: float, num_training_steps: int) -> int:
    """Updates in which only the head is trained; below 1 the option is a share of the run, -1 is all of it."""
    if freeze_encoder_steps == -1:
        return num_training_steps
    share = freeze_encoder_steps < 1
    return round(freeze_encoder_steps * num_training_steps) if share else int(freeze_encoder_steps)


def load_config(model_args: FineTuningModelArguments) -> SpeechCLConfig:
    """Configuration of the model that the options name; checked before any audio is read."""
    options = parse_config_options(model_args.model_options, "model_options")
    if model_args.weighted_layer_sum:
        options["use_weighted_layer_sum"] = True
    if model_args.model in SIZES:
        return SpeechCLConfig.from_size(model_args.model, **options)
    if not may_be_model(model_args.model):
        raise ValueError(f"model {model_args.model!r}: expected {', '.join(SIZES)}, starter, a folder or a Hub name")
    return read_config(model_args.model, model_args.folder, **options)


def build_model(
    model_class: type[SpeechCLHeadModel], model_args: FineTuningModelArguments, config: SpeechCLConfig
) -> SpeechCLHeadModel:
    """A model with a head, with new weights or with those of a pre-trained encoder."""
    if model_args.is_from_scratch:
        config.objectives = None
        return model_class(config)
    return model_class.from_pretrained(model_args.folder, config=config, dtype=torch.float32, use_safetensors=True)


def choose_trained(
    model: SpeechCLHeadModel,
    model_args: FineTuningModelArguments,
    args: FineTuningArguments,
    masks_frames: bool,
):
    """Freeze what is not to be trained and add adapters, as the options say; log how much is left.

    Returns:
        peft's `LoraModel` with `lora_rank`, None without.
    """
    whole = args.freeze_encoder_steps == -1
    if whole and model_args.lora_rank:
        raise ValueError("freeze_encoder_steps=-1 leaves nothing for lora_rank to adapt: give one of them only")
    tuner = None
    if model_args.lora_rank:
        alpha = model_args.lora_alpha or 2 * model_args.lora_rank
        tuner = add_lora(model, model_args.lora_rank, alpha, model_args.lora_targets)
    if whole:
        model.speechcl.requires_grad_(False)
    if not masks_frames:
        model.speechcl.masked_spec_embed.requires_grad_(False)
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info("%d of %d parameters are trained (%.1f%%)", trained, total, 100 * trained / total)
    return tuner


def describe_finetuning(trainer: "FineTuningTrainer", model_args: FineTuningModelArguments, data_args) -> str:
    """What a card says of how a model was fine-tuned, apart from batches, time and packages.

    Args:
        data_args: with `RegularizationArguments`.
    """
    args, num_updates = trainer.args, trainer.state.max_steps
    frozen = frozen_steps(args.freeze_encoder_steps, num_updates)
    parts = [f"Trained {model_args.origin}; learning rate of the head {args.head_learning_rate:g}"]
    if model_args.lora_rank:
        targets = ", ".join(model_args.lora_targets)
        parts.append(f"adapters of rank {model_args.lora_rank} (LoRA) at {targets}, merged into the weights")
    if args.layer_decay < 1:
        parts.append(f"learning rates fall by {args.layer_decay:g} from layer to layer")
    if frozen:
        parts.append(f"encoder frozen for {'all' if frozen >= num_updates else f'the first {frozen}'} updates")
    if trainer.model.config.use_weighted_layer_sum:
        parts.append("the head sees a learned weighted mean of all layers")
    parts.append(
        f"clips begin up to {data_args.max_shift:g} s later, time masks {data_args.mask_time_prob:g} of "
        f"{data_args.mask_time_span:g} s, {data_args.num_feature_masks} mel masks up to {data_args.mask_feature_span}"
    )
    return "; ".join(parts) + "."


class ValidateLast(TrainerCallback):
    """Validates after the last update, so that the last checkpoint may be the best."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate |= state.global_step >= state.max_steps


class FineTuningTrainer(SpeechTrainer):
    """Trains an encoder with a head: learning rates by depth, a frozen beginning, the best checkpoint at the end."""

    args: FineTuningArguments

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_callback(ValidateLast())

    def learning_rate_of(self, name: str) -> float:
        """Highest learning rate of a parameter, by its name: learning_rate in the encoder's last layer, layer_decay of
        it in the layer before, and so on down to the front end (Clark et al. 2020, arXiv 2003.10555)."""
        if not name.startswith("speechcl."):
            return self.args.head_learning_rate
        num_layers = self.model.config.num_hidden_layers
        layer = re.match(r"speechcl\.layers\.(\d+)\.", name)
        depth = int(layer[1]) + 1 if layer else num_layers if name.startswith("speechcl.norm.") else 0
        return self.args.learning_rate * self.args.layer_decay ** (num_layers - depth)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, float, bool], list] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    key = (name.startswith("speechcl."), self.learning_rate_of(name), name in decayed)
                    groups.setdefault(key, []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": groups[in_encoder, learning_rate, is_decayed],
                        "lr": learning_rate,
                        "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                        "in_encoder": in_encoder,
                    }
                    # The first is the one whose learning rate is logged: the encoder's highest.
                    for in_encoder, learning_rate, is_decayed in sorted(groups, reverse=True)
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

    def train(self, resume_from_checkpoint=None, **kwargs):
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.load_best_model_at_end:
            if self.state.best_model_checkpoint is None:
                logger.warning("the best checkpoint is gone: the weights are those of the last update")
            else:
                # A name, as the state is published and no path is to be.
                self.state.best_model_checkpoint = Path(self.state.best_model_checkpoint).name
                logger.info(
                    "the weights are those of %s, the best by validation %s (%.4g)",
                    self.state.best_model_checkpoint,
                    self.args.metric_for_best_model,
                    self.state.best_metric,
                )
        return result
