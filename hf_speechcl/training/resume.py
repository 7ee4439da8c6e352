"""How a run goes on where it was: its checkpoints, and the options and clips that it was begun with."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.columns import column_of
from ..data.dataset import SpeechDataset
from ..data.folders import source_name, without_folders, write_whole
from ..hub import WEIGHTS, WEIGHTS_INDEX

logger = logging.getLogger(__name__)

OPTIONS = "options.json"
CLIPS = "clips"  # in it: which a run learns and validates

# Training arguments that a run is not gone on with under other values: what differs would be passed over in silence.
KEPT = (
    *("seed", "data_seed", "gradient_accumulation_steps", "grad_cache", "learning_rate", "head_learning_rate"),
    *("layer_decay", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "world_size", "optim"),
    *("max_grad_norm", "freeze_encoder_steps"),
)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The last complete checkpoint: one that was being written when the run was killed is passed over."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    checkpoints = [path for path in folders if path.name.rsplit("-", 1)[1].isdecimal() and _is_complete(path)]
    return max(checkpoints, key=updates_at, default=None)


def updates_at(checkpoint: Path) -> int:
    """Updates done when it was written, by its name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def find_checkpoint(
    output_dir: str, resume_from_checkpoint: str | None, optimizer_file: str = SCHEDULER_NAME
) -> str | None:
    """The checkpoint folder to go on from, or None for a new run.

    Args:
        output_dir, resume_from_checkpoint: as in the training arguments.
        optimizer_file: what a checkpoint has that was saved with its optimizer.

    Raises:
        FileNotFoundError: the checkpoint asked for is not there or not complete, or was saved without an optimizer.
        FileExistsError: no resume was asked for, or one from another folder, but this one holds checkpoints of an
            earlier run; or it holds a model and no checkpoint.
    """
    newest = newest_checkpoint(output_dir)
    is_finished = any((Path(output_dir) / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    if newest is None and is_finished and resume_from_checkpoint in (None, "last"):
        raise FileExistsError(
            f"{output_dir} holds the model of a finished run without checkpoints: give another --output_dir, or delete "
            "that folder"
        )
    if resume_from_checkpoint == "last":
        logger.info(
            "no complete checkpoint in %s: a new run" if newest is None else "resuming from %s",
            source_name(output_dir) if newest is None else newest.name,
        )
        return None if newest is None else str(_with_optimizer(newest, optimizer_file))
    if resume_from_checkpoint:
        if not _is_complete(Path(resume_from_checkpoint)):
            raise FileNotFoundError(
                f"{resume_from_checkpoint} is not a complete checkpoint: it has no {TRAINER_STATE_NAME}"
            )
        is_own = Path(resume_from_checkpoint).resolve().parent == Path(output_dir).resolve()
        if not is_own and (newest is not None or is_finished):
            raise FileExistsError(
                f"{output_dir} holds {'a model' if newest is None else newest.name} already: give another --output_dir "
                f"to go on from {resume_from_checkpoint}"
            )
        return str(_with_optimizer(Path(resume_from_checkpoint), optimizer_file))
    if newest is not None:
        raise FileExistsError(
            f"{output_dir} holds {newest.name} of an earlier run: pass --resume_from_checkpoint last to go on with it, "
            "or another --output_dir"
        )
    return None


def keep_options(args, checkpoint: str | None, *options) -> None:
    """Write the options of a new run into its folder; refuse to go on with a run under other options.

    Of absolute paths the file keeps the last part and a hash.

    Args:
        args: training arguments, of which the seeds, the accumulation, the number of processes, the metric that the
            best checkpoint is chosen by and what a checkpoint's optimizer holds count.
        checkpoint: what the run goes on from, None for a new run.
        options: dataclasses of which every field counts.

    Raises:
        ValueError: the run was begun with other options; names them.
    """
    current = {name: value for group in options for name, value in vars(group).items()}
    current |= {name: getattr(args, name) for name in KEPT if hasattr(args, name)}
    if args.metric_for_best_model is not None:  # a run without one has no best that another could be compared with
        current["metric_for_best_model"] = args.metric_for_best_model.removeprefix("eval_")
    current = {name: without_folders(value) for name, value in current.items()}
    file = Path(args.output_dir) / OPTIONS
    earlier, begun = _begun_with(checkpoint)
    if begun:
        changed = [
            f"{name}={begun[name]!r}, now {value!r}"
            for name, value in current.items()
            if begun.get(name, value) != value
        ]
        if changed:
            raise ValueError(
                f"{earlier} was begun with {'; '.join(changed)}: give the same options to go on with it"
                + ("; what has a # is an absolute path" if any("#" in change for change in changed) else "")
            )
        if CLIPS in begun:
            current[CLIPS] = begun[CLIPS]
    if args.process_index == 0:
        _write_options(file, current)


def describe_clips(dataset: SpeechDataset, targets: Sequence | None = None) -> str:
    """What tells the clips of a data set, their order and what each teaches, numbers or lists of these, from others."""
    digest = hashlib.sha256("\n".join(column_of(dataset.corpus, "id").to_pylist()).encode())
    if targets is not None:
        digest.update(json.dumps([np.asarray(target).tolist() for target in targets]).encode())
    digest.update((100 * dataset.durations).round().astype(int).tobytes())
    return f"{len(dataset)} clips #{digest.hexdigest()[:12]}"


def keep_clips(args, checkpoint: str | Path | None, clips: dict[str, str]) -> None:
    """Write beside the options of a run which clips it learns and validates; refuse to go on with others.

    Raises:
        ValueError: the run was begun with other clips.
    """
    earlier, begun = _begun_with(checkpoint)
    before = begun.get(CLIPS, clips)
    changed = [f"{split} {before[split]}, now {found}" for split, found in clips.items() if before[split] != found]
    if changed:
        raise ValueError(
            f"{earlier} was begun with other clips ({'; '.join(changed)}): give it the corpus as it was, or begin anew "
            "in another --output_dir"
        )
    file = Path(args.output_dir) / OPTIONS
    if args.process_index == 0:
        _write_options(file, {**(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}), CLIPS: clips})


def _begun_with(checkpoint: str | Path | None) -> tuple[Path | None, dict]:
    """The folder of the run that a checkpoint is of, and what its file of options says."""
    if checkpoint is None:
        return None, {}
    folder = Path(os.path.abspath(checkpoint)).parent
    return folder, json.loads((folder / OPTIONS).read_text(encoding="utf-8")) if (folder / OPTIONS).is_file() else {}


def _write_options(file: Path, options: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(options, indent=1))


def _with_optimizer(checkpoint: Path, optimizer_file: str) -> Path:
    if not (checkpoint / optimizer_file).is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no optimizer, as --save_only_model asks: no run can go on with it; begin a new one "
            "with its weights (--encoder, --model)"
        )
    return checkpoint


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, which is its trainer state."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
