"""transformers' Trainer with batches by duration and a loss that is exact over micro-batches and ranks."""

import itertools
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..curves import CURVES, plot_curves
from ..data.batching import DurationBatchSampler
from ..data.collators import float_waveforms
from ..data.dataset import SpeechDataset
from ..data.folders import source_name
from ..hub import prepare_repository, publish
from ..objectives import ObjectiveOutput
from .resume import describe_clips, keep_clips, newest_checkpoint

logger = logging.getLogger(__name__)


class EpochDataLoader(DataLoader):
    """A DataLoader that hands `set_epoch` on to its batch sampler, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The items in their order, up to `depth` of them made by a thread while the caller works on earlier ones."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


class Sums:
    """Losses, item counts and metrics of objectives, added up over batches on their device, without waiting for it."""

    def __init__(self):
        self.outputs: dict[str, ObjectiveOutput] = {}
        self.num_skipped = torch.tensor(0)

    @torch.no_grad()
    def add(self, outputs: dict[str, ObjectiveOutput], num_skipped: torch.Tensor) -> None:
        self.num_skipped = self.num_skipped + num_skipped
        for name, output in outputs.items():
            loss, num_items, metrics = output.loss.detach(), output.num_items, output.metrics
            if name in self.outputs:
                total = self.outputs[name]
                loss, num_items = total.loss + loss, total.num_items + num_items
                metrics = {key: total.metrics[key] + value for key, value in metrics.items()}
            self.outputs[name] = ObjectiveOutput(loss, num_items, metrics)

    def over_ranks(self) -> "Sums":
        """Added up over ranks; a rank may have nothing to add."""
        total = Sums()
        outputs = {
            name: ObjectiveOutput(
                o.loss.cpu(), o.num_items.cpu(), {key: value.cpu() for key, value in o.metrics.items()}
            )
            for name, o in self.outputs.items()
        }
        for part in gather_object([(outputs, self.num_skipped.cpu())]):
            total.add(*part)
        return total


class SpeechTrainer(Trainer):
    """A Trainer whose loss is, for each objective, the sum over all micro-batches and ranks divided by their count.

    Subclasses say what a batch is worth: `objective_outputs` and `count_items`.

    Args:
        max_seconds_per_batch: seconds of audio in a batch on one device, padding included.
        eval_collator: collator for validation, if it differs from `data_collator`.
        kwargs: as for `transformers.Trainer`; the data sets are `SpeechDataset`s.
    """

    train_dataset: SpeechDataset
    eval_dataset: SpeechDataset

    def __init__(self, *, max_seconds_per_batch: float, eval_collator=None, **kwargs):
        if kwargs["args"].n_gpu > 1:
            logger.warning("one of %d GPUs is used: accelerate launch or torchrun use all", kwargs["args"].n_gpu)
            kwargs[
                "args"
            ]._n_gpu = 1  # or the Trainer would wrap the model in DataParallel, which splits batches by rows
        super().__init__(**kwargs)
        self.max_seconds_per_batch = max_seconds_per_batch
        self.eval_collator = eval_collator or self.data_collator
        self.loss_is_scaled_for_ga = True
        if self.args.dataloader_num_workers == 0:
            for dataset in (self.train_dataset, self.eval_dataset):
                dataset.keep_decoded(self.args.decoded_gb * 1e9)
        self.train_sums = Sums()
        self.is_validating = False
        self.is_resumed = False
        self.makes_ahead = self.args.device.type != "cpu"  # where the model runs on the same cores, nothing is won
        self.batches_of: tuple[Iterator | None, Iterator | None] = (None, None)

    def objective_outputs(self, model, inputs: dict) -> dict[str, ObjectiveOutput]:
        """Sums of every objective on a batch."""
        raise NotImplementedError

    def count_items(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Items of every objective in a batch, before the forward pass."""
        raise NotImplementedError

    def objective_weights(self) -> dict[str, float]:
        """Weight of every objective in the loss."""
        raise NotImplementedError

    def batch_sampler(self, dataset: SpeechDataset, shuffle: bool, **options) -> Sampler:
        """Which clips go into which batch; `options` are seed, rank and world_size."""
        return DurationBatchSampler(dataset.durations, self.max_seconds_per_batch, shuffle=shuffle, **options)

    def _loader(self, dataset: SpeechDataset, collator, shuffle: bool) -> DataLoader:
        sampler = self.batch_sampler(
            dataset,
            shuffle,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        workers = self.args.dataloader_num_workers
        return EpochDataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            generator=torch.Generator(),  # or each pass would draw from the generator that dropout draws from
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers > 0 else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.is_resumed = bool(resume_from_checkpoint)
        if resume_from_checkpoint is True and (newest := newest_checkpoint(self.args.output_dir)):
            resume_from_checkpoint = str(newest)  # transformers would take one that was not written to its end
        checkpoint = None if resume_from_checkpoint is True else resume_from_checkpoint
        splits = {
            "train": (self.train_dataset, self.data_collator),
            "validation": (self.eval_dataset, self.eval_collator),
        }
        clips = {}
        for split, (dataset, collator) in splits.items():
            targets = getattr(collator, "labels", dataset.labels if dataset.has_labels else None)
            clips[split] = describe_clips(dataset, targets)
        keep_clips(self.args, checkpoint or None, clips)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """Go through the clips once; a run that goes on from its last update makes no more."""
        if self.state.global_step >= self.state.max_steps:
            logger.info("all %d updates are made already", self.state.max_steps)
            self.control.should_training_stop = True
            return
        self.batches_of = (None, None)  # persistent workers give every pass the same iterator
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.data_collator, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: SpeechDataset | None = None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, self.eval_collator, shuffle=False)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one update, and how many items of each objective they hold over all ranks."""
        if self.batches_of[0] is not epoch_iterator:
            self.batches_of = (epoch_iterator, ahead(epoch_iterator) if self.makes_ahead else epoch_iterator)
        batches = list(itertools.islice(self.batches_of[1], num_batches))
        counts: dict[str, torch.Tensor] = {}
        for batch in batches:
            for name, count in self.count_items(batch).items():
                counts[name] = counts.get(name, 0) + count
        if counts and self.accelerator.num_processes > 1:
            totals = torch.stack(list(counts.values())).to(device, non_blocking=True)
            counts = dict(zip(counts, self.accelerator.reduce(totals, reduction="sum")))
        return batches, counts

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return float_waveforms(
            {name: values.to(self.args.device, non_blocking=True) for name, values in inputs.items()}
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_skipped = inputs.pop("num_skipped")
        outputs = self.objective_outputs(model, inputs)
        self.train_sums.add(outputs, num_skipped)
        weights = self.objective_weights()
        loss = sum(weights[name] * self.mean_loss(name, output, num_items_in_batch) for name, output in outputs.items())
        return (loss, outputs) if return_outputs else loss

    def mean_loss(self, name: str, output: ObjectiveOutput, num_items: dict[str, torch.Tensor]) -> torch.Tensor:
        """This batch's part of an objective's mean loss over the update, whose items over all ranks are counted."""
        # Gradients are averaged over ranks, and so is the loss in the log; the counts already are of all ranks.
        return output.loss / num_items[name].clamp_min(1) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_finite(logs["loss"])
            sums, self.train_sums = self.train_sums, Sums()
            logs |= self.summarize(sums)
            logs["audio_hours"] = round(self.audio_hours, 4)
        super().log(logs, start_time)

    @property
    def taken_update(self) -> int:
        """The update whose weights the model has: the last, or when training is over the best."""
        has_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        is_best = has_best and not self.is_in_train
        return self.state.best_global_step if is_best else self.state.global_step

    @property
    def audio_hours(self) -> float:
        """Hours of audio trained on so far, repetitions included."""
        return (self.state.epoch or 0) * self.train_dataset.hours

    def check_finite(self, loss: float) -> None:
        """Stop a run that has diverged.

        Raises:
            FloatingPointError: the loss is not finite; says what to do.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at update {self.state.global_step}: lower learning_rate, raise warmup_steps or "
                "train in float32, in a new run, which may begin with weights from before that update; if it is the "
                "validation loss, see above whether all its clips were skipped"
            )

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Scalars of every objective, over all ranks."""
        sums = sums.over_ranks()
        scalars = {"skipped_clips": int(sums.num_skipped)} if sums.num_skipped else {}
        for name, output in sums.outputs.items():
            num_items = output.num_items.item()
            scalars[f"{name}/loss"] = output.loss.item() / num_items if num_items else math.nan
            scalars |= {
                f"{name}/{key}": value for key, value in self.summarize_metrics(name, output, num_items).items()
            }
        return scalars

    def summarize_metrics(self, name: str, output: ObjectiveOutput, num_items: int) -> dict[str, float]:
        """Scalars of one objective's metrics."""
        return {}

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Losses and metrics on a validation set, with the same masks every time."""
        loader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = loader
        self.model.eval()
        self.is_validating = True
        try:
            metrics = self._validate(loader, metric_key_prefix)
        finally:
            self.is_validating = False
        is_usual = eval_dataset is None and metric_key_prefix == "eval"
        if not is_usual or self.taken_update == self.state.global_step:
            self.log(metrics)
        else:  # not in the log, whose curves it would end with
            logger.info("update %d, the best: %s", self.taken_update, metrics)
        self.check_finite(metrics[f"{metric_key_prefix}_loss"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validate(self, loader: DataLoader, prefix: str) -> dict[str, float]:
        sums = Sums()
        for inputs in ahead(loader) if self.makes_ahead else loader:
            inputs = self._prepare_inputs(inputs)
            num_skipped = inputs.pop("num_skipped")
            sums.add(self.objective_outputs(self.model, inputs), num_skipped)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        scalars = self.summarize(sums)
        weights = self.objective_weights()
        metrics = {"loss": sum(weight * scalars.get(f"{name}/loss", math.nan) for name, weight in weights.items())}
        return {f"{prefix}_{name}": value for name, value in (metrics | scalars).items()}

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this update is the best: only one with a checkpoint can be, and of equal ones the last is."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if name in metrics and self.args.save_strategy != SaveStrategy.BEST:
            if not self.control.should_save:
                return False
            if metrics[name] == self.state.best_metric:
                self.state.best_metric = None  # better than none
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads, with paths of this machine and, where one was given, the token of the Hub.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.state.best_model_checkpoint is not None:
            checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
            self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            self.state.best_model_checkpoint = best

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # The state on disk says which update was best, not in which folder of which machine.
        best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def save_state(self) -> None:
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = None if best is None else Path(best).name
        super().save_state()
        self.state.best_model_checkpoint = best

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        super().save_model(output_dir, _internal_call=True)  # not yet pushed: its card is not written

    def init_hf_repo(self, token=None, private=None) -> None:
        self.hub_model_id = self.args.hub_model_id  # `prepare_to_push` made it when the options had been read

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: cards.py writes the card, which knows what was trained on what."""

    def push_to_hub(self, commit_message: str | None = None, **kwargs) -> str | None:
        """Publish output_dir; to be called when all is written into it. Returns the address of the commit."""
        if not self.is_world_process_zero():
            return None
        folder, args = self.args.output_dir, self.args
        try:
            return publish(
                folder,
                args.hub_model_id or Path(folder).name,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message=commit_message or f"Model after {self.taken_update} updates",
            )
        except Exception:
            logger.error("the run is complete, but not published: try again with scripts/publish.py")
            raise

    def floating_point_ops(self, inputs: dict) -> int:
        """6 operations per weight and encoder frame, forward and backward."""
        frames = self.model._get_feat_extract_output_lengths(inputs["input_values"].shape[1])
        return 6 * self.model.num_parameters(only_trainable=True) * frames * len(inputs["input_values"])


def prepare_to_push(args) -> None:
    """With `push_to_hub`, make the repository before a run begins, or say what is in the way."""
    if args.push_to_hub and args.process_index == 0:
        args.hub_model_id = prepare_repository(
            args.hub_model_id or Path(args.output_dir).name,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        logger.info("the model will be published as %s", args.hub_model_id)


def finish_run(
    trainer: SpeechTrainer, runtime_seconds: float, write_card: Callable[[Path, dict[str, float], float], None]
) -> None:
    """Save a trained model, validate it, and leave curves, results and card beside it; publish it if asked to.

    Args:
        write_card: given the folder, the validation metrics and `runtime_seconds`.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    plot_curves({"": trainer.state.log_history}, folder / CURVES)
    (folder / "results.json").write_text(json.dumps(metrics, indent=2))
    write_card(folder, metrics, runtime_seconds)
    logger.info("model, card and curves are in %s", source_name(args.output_dir))
    if args.push_to_hub:
        logger.info("published: %s", trainer.push_to_hub())
