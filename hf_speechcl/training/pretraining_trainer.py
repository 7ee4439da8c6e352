"""The Trainer of pre-training: objectives that compare clips compare all clips of an update."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from ..data.batching import DurationBatchSampler, LabelBatchSampler
from ..distributed import gather_rows
from ..evaluation.probe import Features, PhoneProbe
from ..features import HiddenStates, StackedLogMel
from ..objectives import ObjectiveOutput, UtteranceObjective
from .guard import CollapseGuard
from .trainer import SpeechTrainer

logger = logging.getLogger(__name__)

EVALUATION_CLIPS = 128  # compared with each other in validation
PROBE_METRICS = ("phone_accuracy", "abx_error")


def layer_names(layers: list[int]) -> list[str]:
    """What each layer that the probe measures is called in front of its metrics."""
    return [f"layer{layer}/" if len(layers) > 1 else "" for layer in layers]


class RandomState:
    """The state of the generators that dropout draws from, to draw the same again."""

    def __init__(self, device: torch.device):
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        self.of_which = () if device.type == "mps" else (device,)  # there is one
        self.cpu = torch.get_rng_state()
        self.on_device = None if self.accelerator is None else self.accelerator.get_rng_state(*self.of_which)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            self.accelerator.set_rng_state(self.on_device, *self.of_which)


@dataclass
class CachedComparison:
    """What an objective made of all clips of an update, with the gradient of its mean loss.

    Attributes:
        output: detached.
        gradients: for each micro-batch of this rank, by the names of what `embed` gives.
        parameters: those that `compare` itself uses, with their gradients.
    """

    output: ObjectiveOutput
    gradients: list[dict[str, torch.Tensor]]
    parameters: list[tuple[torch.nn.Parameter, torch.Tensor]]


class AfterUpdate(TrainerCallback):
    """Tells the objectives of every update, for teachers that follow the encoder."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.after_update()


class LogMelProbe(TrainerCallback):
    """Begins the log of a new run with what the probe finds in log-mel frames, for the encoder to be held against."""

    def __init__(self, trainer: "PretrainingTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            features = StackedLogMel(self.trainer.model.config)
            self.trainer.log(self.trainer.measure_probe("probe_log_mel", [""], features))


class PretrainingTrainer(SpeechTrainer):
    """Trains a `SpeechCLForPreTraining`.

    Objectives that compare clips get all clips of an update, over micro-batches and ranks. With several micro-batches
    their views are encoded twice, once without gradient to compare them all, once with the gradient found (GradCache:
    Gao et al. 2021, arXiv 2101.06983), so a batch that does not fit into memory gives the gradient it would give.

    Args:
        max_clips_per_batch: limit of a batch in clips, beside that in seconds.
        clips_per_label: clips of each label in a batch, if the training set has labels and they are compared.
        view_seconds: longest view, for the size of such a batch.
        probe: clips with phones, by which each validation measures layers of the encoder, and these layers.
        kwargs: as for `SpeechTrainer`.
    """

    def __init__(
        self,
        *,
        max_clips_per_batch: int | None = None,
        clips_per_label: int = 4,
        view_seconds: float = 3.0,
        probe: tuple[PhoneProbe, HiddenStates] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.args.torch_compile and self.model.comparing:
            raise ValueError(
                f"torch_compile does not work with {', '.join(self.model.comparing)}, which encode views apart from "
                "the forward pass: leave it out"
            )
        if self.model.comparing and len(self.eval_dataset) < 2:
            raise ValueError(
                f"{', '.join(self.model.comparing)} compare clips, and validation has one clip only: raise "
                "validation_fraction, or give a source with a validation split"
            )
        if self.eval_dataset.has_labels:
            self._check_validation_labels()
        self.max_clips_per_batch, self.clips_per_label = max_clips_per_batch, clips_per_label
        self.view_seconds = view_seconds
        self.guard = CollapseGuard(self.model, self.args.learning_rate, self.args.stop_on_collapse)
        self.cached: dict[str, CachedComparison] = {}
        self.random_states: list[RandomState] = []
        self.micro_batch = 0
        self.uncached: list[dict] | None = None
        self.embedded: list[dict[str, dict[str, torch.Tensor]]] = []
        self.add_callback(AfterUpdate())
        self.probe = probe
        if probe is not None:
            self.add_callback(LogMelProbe(self))

    def _check_validation_labels(self) -> None:
        """Refuse validation clips that there is nothing to compare by.

        Raises:
            ValueError: fewer than two labels have as many views as an objective needs of each.
        """
        _, counts = np.unique(self.eval_dataset.labels, return_counts=True)
        for name, objective in self.model.comparing.items():
            if not objective.views_per_class:
                continue
            found = int((counts * objective.num_views >= objective.views_per_class).sum())
            if found < 2:
                clips = -(-objective.views_per_class // objective.num_views)
                raise ValueError(
                    f"{name} compares clips by their labels, and of those of validation {found} has {clips} clips or "
                    "more, where two are needed: name other clips by validation_split, or a split that is not there to "
                    "hold out training clips, and raise validation_fraction"
                )

    def batch_sampler(self, dataset, shuffle, **options):
        if shuffle and dataset.has_labels and self.model.comparing:
            longest = float(dataset.durations.max())
            if len(self.model.comparing) == len(self.model.objectives):
                longest = min(longest, self.view_seconds)
            clips = int(self.max_seconds_per_batch / longest)
            sampler = LabelBatchSampler(
                dataset.labels, min(clips, self.max_clips_per_batch or clips), self.clips_per_label, **options
            )
            logger.info("batches of %d clips of each of %d labels", self.clips_per_label, sampler.labels_per_batch)
            return sampler
        return DurationBatchSampler(
            dataset.durations,
            self.max_seconds_per_batch,
            shuffle=shuffle,
            max_clips=self.max_clips_per_batch,
            **options,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.model.set_progress(self.state.global_step / max(self.state.max_steps, 1))
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micro_batch, self.num_micro_batches = 0, len(batches)
        self.cached, self.random_states = {}, []
        self.uncached = batches if self.model.comparing and len(batches) > 1 and self.args.grad_cache else None
        return batches, counts

    def training_step(self, *args, **kwargs):
        # Not earlier, as the generators that dropout draws from are restored between the batches and the first step.
        if self.uncached is not None:
            self._cache_gradients(self.uncached)
            self.uncached = None
        return super().training_step(*args, **kwargs)

    def _cache_gradients(self, batches: list[dict]) -> None:
        self.model.train()
        embedded = []
        for batch in batches:
            self.random_states.append(RandomState(self.args.device))
            inputs = self._prepare_inputs({key: batch[key] for key in batch if key.startswith(("view_", "clip_"))})
            with torch.no_grad(), self.accelerator.autocast():
                embedded.append(self.model.embed(inputs))
        for name, objective in self.model.comparing.items():
            leaves = [
                {key: value.requires_grad_(value.is_floating_point()) for key, value in parts[name].items()}
                for parts in embedded
            ]
            output = self._compare(objective, {key: torch.cat([part[key] for part in leaves]) for key in leaves[0]})
            inputs = [value for part in leaves for value in part.values() if value.requires_grad]
            parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            mean = output.loss / output.num_items.clamp_min(1)
            gradients = torch.autograd.grad(mean, [*inputs, *parameters], allow_unused=True)
            found = dict(zip(map(id, [*inputs, *parameters]), gradients))
            output.loss = output.loss.detach()
            self.cached[name] = CachedComparison(
                output,
                [{key: found[id(v)] for key, v in part.items() if found.get(id(v)) is not None} for part in leaves],
                [(parameter, found[id(parameter)]) for parameter in parameters if found[id(parameter)] is not None],
            )

    def _compare(self, objective: UtteranceObjective, embedded: dict[str, torch.Tensor]) -> ObjectiveOutput:
        return objective.compare({key: gather_rows(value) for key, value in embedded.items()})

    def objective_outputs(self, model, inputs):
        if model.training and self.cached:
            self.random_states[self.micro_batch].restore()
        outputs = model(compare=False, **inputs)
        objectives = dict(outputs.objectives)
        if not model.training:
            self.embedded.append(
                {name: {key: value.cpu() for key, value in parts.items()} for name, parts in outputs.embedded.items()}
            )
            self.guard.observe_states(objectives)
            return objectives
        for name, embedded in outputs.embedded.items():
            if self.cached:
                objectives[name] = self._with_cached_gradient(name, embedded)
            else:
                objectives[name] = self._compare(self.model.objectives[name], embedded)
        self.micro_batch += 1
        return objectives

    def _with_cached_gradient(self, name: str, embedded: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """The output for the whole update, with the gradient through this micro-batch's embeddings."""
        cached = self.cached[name]
        through = sum(
            (embedded[key] * gradient).sum() for key, gradient in cached.gradients[self.micro_batch].items()
        ) * self.num_micro_batches + sum((parameter * gradient).sum() for parameter, gradient in cached.parameters)
        loss = cached.output.loss + cached.output.num_items.clamp_min(1) * (through - through.detach())
        return ObjectiveOutput(loss, cached.output.num_items, cached.output.metrics)

    def mean_loss(self, name, output, num_items):
        if name in self.model.comparing:
            return output.loss / output.num_items.clamp_min(1) / self.num_micro_batches
        return super().mean_loss(name, output, num_items)

    def count_items(self, inputs):
        return self.model.count_items(inputs)

    def objective_weights(self):
        return self.model.weights

    def summarize_metrics(self, name, output, num_items):
        return self.model.objectives[name].summarize(dict(output.metrics), num_items)

    def evaluate(self, *args, **kwargs):
        self.embedded = []
        with self.guard.watching():
            return super().evaluate(*args, **kwargs)

    def summarize(self, sums):
        if not self.is_validating:
            return super().summarize(sums)
        batches, self.embedded = gather_object(self.embedded), []
        for name, objective in self.model.comparing.items():
            for output in self._compare_validation(objective, [batch[name] for batch in batches]):
                sums.add({name: output}, torch.tensor(0))
                self.guard.observe_states({name: output})
        scalars = super().summarize(sums)
        scalars |= self.guard.judge(scalars, self.taken_update)
        if self.probe is None:
            return scalars
        return scalars | self.measure_probe("probe", layer_names(self.probe[1].layers), self.probe[1])

    def measure_probe(self, prefix: str, names: list[str], features: Features) -> dict[str, float]:
        """Phone accuracy and ABX error of each kind of frames, by its name, found by the first process for all."""
        scalars = [{}]
        if self.is_world_process_zero():
            found = self.probe[0].measure(features)
            scalars = [
                {f"{prefix}/{name}{key}": kind[key] for name, kind in zip(names, found) for key in PROBE_METRICS}
            ]
            shown = ", ".join(f"{name} {value:.1%}" for name, value in scalars[0].items())
            logger.info("update %d: %s", self.state.global_step, shown)
        return broadcast_object_list(scalars)[0]

    def _compare_validation(self, objective: UtteranceObjective, parts: list[dict]) -> list[ObjectiveOutput]:
        """Clips of all ranks in groups that do not depend on the batches they were encoded in."""
        embedded = {key: torch.cat([part[key].to(self.args.device) for part in parts]) for key in parts[0]}
        together = -(-objective.views_per_class // objective.num_views)
        groups = validation_groups(embedded["labels"].tolist(), embedded["keys"].tolist(), together)
        return [objective.compare({key: value[group] for key, value in embedded.items()}) for group in groups]


def validation_groups(labels: list[int], keys: list[int], together: int) -> list[list[int]]:
    """Places of the clips that are compared with each other, about `EVALUATION_CLIPS`, in the order of their keys.

    Clips of a label stay side by side by so many as an objective needs of one (`together`), what is left of it comes
    last: clips drawn one by one would mostly have no other of their label.
    """
    by_label: dict[int, list[int]] = {}
    for place in sorted(range(len(keys)), key=keys.__getitem__):
        by_label.setdefault(labels[place], []).append(place)
    step = max(together, 1)
    parts = [places[start : start + step] for places in by_label.values() for start in range(0, len(places), step)]
    parts.sort(key=lambda part: (len(part) < step, keys[part[0]]))
    num_groups, placed = -(-len(keys) // EVALUATION_CLIPS) or 1, 0
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for part in parts:
        groups[placed * num_groups // len(keys)] += part
        placed += len(part)
    return [group for group in groups if group]
