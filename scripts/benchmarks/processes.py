"""Runs of the package's scripts in processes of their own: measured, resumed, made once; and the table of results."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
from safetensors import safe_open

from hf_speechcl.training.resume import newest_checkpoint, updates_at

logger = logging.getLogger(__name__)

SCRIPTS = Path(__file__).resolve().parents[1]
LOG_TAIL = 15  # lines of a failed run's log that are shown

CLIP_COUNTS = {
    f"{name}_{kind}": pyarrow.list_(pyarrow.int32()) for name in ("cer", "wer") for kind in ("edits", "lengths")
}
RATES = {f"{name}{end}": pyarrow.float64() for name in ("cer", "wer") for end in ("", "_low", "_high")}
SCHEMA = pyarrow.schema(
    {
        "run": pyarrow.string(),
        "recipe": pyarrow.string(),
        "tier": pyarrow.string(),
        "phase": pyarrow.string(),
        "table": pyarrow.string(),
        "arm": pyarrow.string(),
        "seed": pyarrow.int64(),
        "labels": pyarrow.string(),
        "label_minutes": pyarrow.float64(),
        "options": pyarrow.string(),
        **RATES,
        "clips": pyarrow.list_(pyarrow.string()),
        **CLIP_COUNTS,
        "validation_cer": pyarrow.float64(),
        "validation_wer": pyarrow.float64(),
        "loss_before": pyarrow.float64(),
        "loss_last": pyarrow.float64(),
        "updates": pyarrow.int64(),
        "audio_hours": pyarrow.float64(),
        "pretraining_wall_seconds": pyarrow.float64(),
        "pretraining_cpu_seconds": pyarrow.float64(),
        "finetuning_updates": pyarrow.int64(),
        "finetuning_wall_seconds": pyarrow.float64(),
        "finetuning_cpu_seconds": pyarrow.float64(),
        "resumed": pyarrow.bool_(),
        "parameters": pyarrow.int64(),
        "probe_accuracy": pyarrow.float64(),
        "abx_error": pyarrow.float64(),
        "few_shot": pyarrow.float64(),
        "commit": pyarrow.string(),
        "device": pyarrow.string(),
        "machine": pyarrow.string(),
        "finished": pyarrow.timestamp("s"),
    }
)


class RunError(Exception):
    """A script that ended with an error."""


class Processes:
    """Starts scripts and measures them.

    Args:
        threads: of torch, in each.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.lock = threading.Lock()
        self.running: set[int] = set()
        self.is_stopped = False

    def run(self, script: str, argv: list[str], log: Path, keep_open: int) -> dict[str, float]:
        """Run a script to its end, its output added to `log`.

        Args:
            keep_open: file descriptor that the process has open as well.

        Returns:
            `wall_seconds` and `cpu_seconds`, of the process and those that it started.

        Raises:
            RunError: with the end of the log.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        began = time.monotonic()
        with log.open("a", encoding="utf-8") as file, self.lock:
            if self.is_stopped:
                raise RunError("stopped")
            process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / script), *argv],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[keep_open],
            )
            self.running.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.running.discard(process.pid)
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            raise RunError(f"{script} ended with {process.returncode}, {log}:\n" + "\n".join(lines))
        return {"wall_seconds": time.monotonic() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}

    def stop(self) -> None:
        """End all processes, and start no more."""
        with self.lock:
            self.is_stopped = True
            for number in self.running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(number, 15)


@contextlib.contextmanager
def only_one(lock: Path):
    """A file descriptor that is locked as long as this block, or a process that has it open, lasts.

    Raises:
        RunError: another process has the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{lock} is held: another process is at work there") from None
        yield file.fileno()


def train(processes: Processes, script: str, folder: Path, argv: list[str], save_steps: int, keep_open: int) -> dict:
    """Train into `folder`, from the last checkpoint if there is one; what it took is kept in a file beside it.

    A resumed run's seconds are those of its last process, in proportion to the updates that this one made; where it
    made none, as the run was killed after its last update, it is made anew.

    Returns:
        `wall_seconds`, `cpu_seconds`, `updates`, `audio_hours`, `loss_before`, `loss_last`, `parameters`, `resumed`.
    """
    return made_once(
        beside(folder, ".json"),
        lambda: _train(processes, script, folder, argv, save_steps, keep_open),
    )


def _train(processes, script, folder, argv, save_steps, keep_open) -> dict:
    checkpoint = newest_checkpoint(folder)
    resumed_at = 0 if checkpoint is None else updates_at(checkpoint)
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed before its first, or between its end and its note
    took = processes.run(
        script,
        [*argv, "--output_dir", str(folder), "--save_steps", str(save_steps), "--resume_from_checkpoint", "last"],
        beside(folder, ".log"),
        keep_open,
    )
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    updates, log = state["global_step"], state["log_history"]
    if resumed_at >= updates:
        logger.warning("%s was killed after its last update, so nobody knows how long it took: it is made anew", folder)
        shutil.rmtree(folder)
        return _train(processes, script, folder, argv, save_steps, keep_open)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    before, last = losses_at_the_end(log, updates)
    return {
        **{name: seconds * updates / (updates - resumed_at) for name, seconds in took.items()},
        "updates": updates,
        "audio_hours": max((entry["audio_hours"] for entry in log if "audio_hours" in entry), default=None),
        "loss_before": before,
        "loss_last": last,
        "parameters": count_parameters(folder / "model.safetensors"),
        "resumed": resumed_at > 0,
    }


def losses_at_the_end(log: list[dict], updates: int) -> tuple[float | None, float | None]:
    """Mean training loss of the last fifth of the updates but one, and of the last; None where none was logged."""
    fifths = [
        [entry["loss"] for entry in log if "loss" in entry and low * updates < entry["step"] <= high * updates]
        for low, high in ((0.6, 0.8), (0.8, 1.0))
    ]
    before, last = (sum(losses) / len(losses) if losses else None for losses in fifths)
    return before, last


def count_parameters(file: Path) -> int:
    """Of a model, from the header of its weights."""
    with safe_open(file, framework="np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def beside(folder: Path, ending: str) -> Path:
    """A file beside a folder, with its name and an ending; names may hold points."""
    return folder.with_name(folder.name + ending)


def made_once(file: Path, make: Callable[[], dict]) -> dict:
    """What the JSON file says, which is written with what `make` gives if it is not there."""
    if not file.is_file():
        write_atomically(file, lambda begun: begun.write_text(json.dumps(make(), indent=1), encoding="utf-8"))
    return json.loads(file.read_text(encoding="utf-8"))


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    begun = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    write(begun)
    begun.replace(file)


class Results:
    """One row for every finished run, in a parquet file that processes may share.

    Args:
        file: the parquet file; it need not be there.
    """

    def __init__(self, file: Path):
        self.file = file

    def rows(self) -> list[dict]:
        """All rows, in the order in which they were added."""
        if not self.file.is_file():
            return []
        return pyarrow.parquet.read_table(self.file, schema=SCHEMA).to_pylist()

    def add(self, row: dict) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [*(found for found in self.rows() if found["run"] != row["run"]), row]
            table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
            write_atomically(self.file, lambda begun: pyarrow.parquet.write_table(table, begun))


def commit() -> str | None:
    """Of the repository, with "+" where files were changed since; None where there is none."""
    git = ["git", "-C", str(SCRIPTS)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed.strip() else "")
