"""Encoder and weighted objectives in one module, for the trainer to wrap."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_speechcl import SpeechCLConfig
from .modeling_speechcl import SpeechCLModel, SpeechCLPreTrainedModel
from .objectives import OBJECTIVES, Objective, ObjectiveOutput, UtteranceObjective

MAY_BE_ZERO = ("seed", "num_views", "_weight", "_prob", "_band")


@dataclass
class SpeechCLForPreTrainingOutput(ModelOutput):
    """
    Attributes:
        loss: weighted sum of the objectives' mean losses over this batch; None without `compare`.
        objectives: the sums and counts of each objective, by name.
        embedded: without `compare`, what the objectives that compare clips made of the batch, by name.
    """

    loss: torch.Tensor | None = None
    objectives: dict[str, ObjectiveOutput] | None = None
    embedded: dict[str, dict[str, torch.Tensor]] | None = None


def objective_options(name: str) -> dict[str, inspect.Parameter]:
    """Options that objective `name` takes, with their defaults."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    parameters = dict(inspect.signature(OBJECTIVES[name].__init__).parameters)
    return {key: value for key, value in parameters.items() if key not in ("self", "config")}


def build_objective(name: str, config, options: dict) -> Objective:
    """The objective `name` for an encoder configured by `config`; `options` may also hold its "weight".

    Raises:
        ValueError: unknown objective or option, naming those there are.
    """
    known = objective_options(name)
    unknown = set(options) - set(known) - {"weight"}
    if unknown:
        raise ValueError(f"objective {name!r} has no option {', '.join(sorted(unknown))}: it takes {', '.join(known)}")
    for key in set(options) & set(known):
        _check_option(f"{name}.{key}", options[key], known[key].default)
    return OBJECTIVES[name](config, **{key: value for key, value in options.items() if key != "weight"})


def _check_option(name: str, value, default) -> None:
    """Options are of the type of their defaults; numbers are positive, but for those of which 0 means none."""
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    kind = (int | float) if isinstance(default, float) else type(default)
    if not isinstance(value, kind) or (is_number and isinstance(value, bool)):
        raise ValueError(f"{name} must be like its default {default!r}, found {value!r}")
    if is_number and (value < 0 or (value == 0 and not name.endswith(MAY_BE_ZERO))):
        raise ValueError(f"{name} must be positive, found {value!r}")


class EncodeOnce:
    """An encoder that keeps what it made of a batch: objectives that ask for the same inputs share one pass."""

    def __init__(self, encoder: nn.Module):
        self.encoder, self.config, self.calls = encoder, encoder.config, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, input_values, **inputs):
        for seen_values, seen_inputs, output in self.calls:
            if seen_values is input_values and seen_inputs.keys() == inputs.keys():
                if all(seen_inputs[key] is inputs[key] for key in inputs):
                    return output
        output = self.encoder(input_values, **inputs)
        self.calls.append((input_values, inputs, output))
        return output


class SpeechCLForPreTraining(SpeechCLPreTrainedModel):
    """Encoder trained by the objectives that `config.objectives` names, `{name: {"weight": 1.0, option: value, …}}`."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__(config)
        if not config.objectives:
            raise ValueError(f"config.objectives is empty: name at least one of {', '.join(OBJECTIVES)}")
        self.speechcl = SpeechCLModel(config)
        self.objectives = nn.ModuleDict(
            {name: build_objective(name, config, options) for name, options in config.objectives.items()}
        )
        # DistributedDataParallel waits for the gradient of every weight that is trained.
        uses_mask = any(objective.uses_mask for objective in self.objectives.values())
        self.speechcl.masked_spec_embed.requires_grad_(uses_mask)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "init_weights") and not isinstance(module, SpeechCLPreTrainedModel):
            module.init_weights()

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective in the loss."""
        return {name: options.get("weight", 1.0) for name, options in self.config.objectives.items()}

    @property
    def comparing(self) -> dict[str, UtteranceObjective]:
        """The objectives that compare clips with each other."""
        return {name: value for name, value in self.objectives.items() if isinstance(value, UtteranceObjective)}

    def collator_options(self) -> dict[str, int | float]:
        """Fields that a `PretrainingCollator` must have for the batches to serve every objective."""
        options: dict[str, int | float] = {}
        for objective in self.objectives.values():
            for name, value in objective.collator_options().items():
                options[name] = max(value, options.get(name, value))
        return options

    def count_items(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Items of each objective in the batch, known before the forward pass; without those that compare clips."""
        return {
            name: objective.count_items(batch)
            for name, objective in self.objectives.items()
            if name not in self.comparing
        }

    def set_progress(self, progress: float) -> None:
        """Tell the objectives which share of the run is done, from 0 to 1."""
        for objective in self.objectives.values():
            objective.set_progress(progress)

    def after_update(self) -> None:
        """Tell the objectives that the weights were updated."""
        for objective in self.objectives.values():
            objective.after_update(self.speechcl)

    def embed(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """What each objective that compares clips makes of the views of a batch, by name."""
        encoder = EncodeOnce(self.speechcl)
        return {name: objective.embed(encoder, batch) for name, objective in self.comparing.items()}

    def forward(self, input_values: torch.Tensor, compare: bool = True, **batch) -> SpeechCLForPreTrainingOutput:
        """Run every objective on a batch of a `PretrainingCollator`, which describes its keys.

        Args:
            input_values: (B, S), with the other keys of the batch.
            compare: compare the clips of this batch with each other. Without, the caller gets their embeddings, to
                compare them with those of other batches and ranks too.
        """
        batch["input_values"] = input_values
        encoder = EncodeOnce(self.speechcl)
        # First of all, so that dropout draws for the embeddings what it draws in `embed`.
        embedded = {name: objective.embed(encoder, batch) for name, objective in self.comparing.items()}
        outputs = {
            name: objective(encoder, batch) for name, objective in self.objectives.items() if name not in embedded
        }
        if not compare:
            return SpeechCLForPreTrainingOutput(objectives=outputs, embedded=embedded)
        outputs |= {name: self.objectives[name].compare(parts) for name, parts in embedded.items()}
        loss = sum(self.weights[name] * output.loss / output.num_items.clamp_min(1) for name, output in outputs.items())
        return SpeechCLForPreTrainingOutput(loss=loss, objectives=outputs)
