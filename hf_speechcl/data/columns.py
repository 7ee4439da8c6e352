"""Columns of a source, whatever their names and types, → those that every corpus has."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow
from datasets import Audio, ClassLabel, Dataset, concatenate_datasets
from pyarrow import compute

from .audio import AudioError, read_duration

logger = logging.getLogger(__name__)


def column_of(rows: Dataset, name: str) -> pyarrow.ChunkedArray:
    """A column of a corpus. (`rows[name]` looks at a corpus that rows were selected from row by row.)"""
    column = rows.data.column(name)
    return column if rows._indices is None else column.take(rows._indices.column(0))


OF_EVERY_CORPUS = ("id", "audio", "text", "label", "duration")


@dataclass(frozen=True)
class Columns:
    """Which columns are read; see `load_corpus`."""

    audio_column: str = "audio"
    text_column: str = "text"
    require_text: bool = False
    label_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    list_columns: Mapping[str, pyarrow.DataType] = field(default_factory=dict)

    def __post_init__(self):
        for option in ("keep_columns", "list_columns"):
            if taken := sorted(set(OF_EVERY_CORPUS) & set(getattr(self, option))):
                raise ValueError(
                    f"{option}: {', '.join(taken)} would hide a column that every corpus has: leave it out"
                )

    @property
    def texts(self) -> dict[str, str]:
        """Columns of texts by their names in the corpus."""
        labels = {} if self.label_column is None else {"label": self.label_column}
        return {"text": self.text_column, **labels, **{column: column for column in self.keep_columns}}

    @property
    def required(self) -> tuple[str, ...]:
        """Those without which a source is refused."""
        return ((self.text_column,) if self.require_text else ()) + (
            () if self.label_column is None else (self.label_column,)
        )


def standard_columns(dataset: Dataset, name: str, columns: Columns) -> Dataset:
    """The columns id, audio, the texts asked for, and duration if there is one; audio is not decoded."""
    audio_column, found = columns.audio_column, ", ".join(dataset.column_names)
    if audio_column not in dataset.column_names:
        raise ValueError(f"{name} has no column {audio_column!r}; it has {found}: set audio_column")
    for option in ("text_column", "label_column"):
        column = getattr(columns, option)
        if column in columns.required and column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {found}: set {option}")
    if missing := [column for column in columns.list_columns if column not in dataset.column_names]:
        raise ValueError(
            f"{name} has no column {' and '.join(map(repr, missing))}; it has {found}: expected "
            f"{describe_lists(columns)}"
        )
    feature = dataset.features[audio_column]
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    if not is_struct and not isinstance(feature, Audio):
        raise ValueError(f"{name}: the column {audio_column!r} holds {feature}, expected audio (bytes and path)")
    dataset = dataset.cast_column(audio_column, Audio(decode=False))
    rows = dataset.select_columns(audio_column)
    if audio_column != "audio":
        rows = rows.rename_column(audio_column, "audio")
    numbers = pyarrow.array(range(len(rows))).cast(pyarrow.string())
    if "id" in dataset.column_names:
        names = _texts(dataset, "id")
    else:
        paths = compute.struct_field(rows.data.column("audio"), "path")
        names = compute.replace_substring_regex(paths, r"^.*/", "")
    table = {"id": compute.if_else(compute.equal(compute.coalesce(names, ""), ""), numbers, names)}
    table |= {column: _texts(dataset, name_in_source) for column, name_in_source in columns.texts.items()}
    table |= {column: _lists(dataset, column, name, columns) for column in columns.list_columns}
    if (seconds := _trusted_durations(dataset, audio_column)) is not None:
        table["duration"] = seconds
    return beside(rows, table)


def _texts(dataset: Dataset, column: str) -> pyarrow.ChunkedArray:
    """A column as texts; null where there is none."""
    if column not in dataset.column_names:
        return pyarrow.chunked_array([pyarrow.nulls(len(dataset), pyarrow.string())])
    values = column_of(dataset, column)
    if isinstance(dataset.features[column], ClassLabel):
        known = compute.if_else(compute.greater_equal(values, 0), values, None)  # -1 stands for a label not known
        return pyarrow.array(dataset.features[column].names).take(known)
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_integer(values.type):
        return values.cast(pyarrow.string())
    return pyarrow.chunked_array([[None if value is None else str(value) for value in values.to_pylist()]])


def _lists(dataset: Dataset, column: str, name: str, columns: Columns) -> pyarrow.ChunkedArray:
    """A column of lists of the type asked for."""
    values = column_of(dataset, column)
    try:
        return values.cast(pyarrow.list_(columns.list_columns[column]))
    except pyarrow.ArrowException:
        raise ValueError(
            f"{name}: the column {column!r} holds {values.type}, expected {describe_lists(columns)}"
        ) from None


def describe_lists(columns: Columns) -> str:
    return " and ".join(f"{column} (list of {kind})" for column, kind in columns.list_columns.items())


def _trusted_durations(dataset: Dataset, audio_column: str) -> pyarrow.ChunkedArray | None:
    """The column duration, if there is one and the headers of a few clips agree that it is in seconds."""
    if "duration" not in dataset.column_names:
        return None
    column = column_of(dataset, "duration")
    if not (pyarrow.types.is_floating(column.type) or pyarrow.types.is_integer(column.type)):
        return None
    seconds = column.cast(pyarrow.float64())
    values = seconds.to_numpy()
    if not (np.isfinite(values) & (values > 0)).all():
        return None
    for row in np.linspace(0, len(values) - 1, num=min(3, len(values)), dtype=int):
        try:
            measured = read_duration(dataset[int(row)][audio_column])
        except AudioError:
            continue
        if abs(measured - values[row]) > 0.1 + 0.05 * measured:
            logger.warning(
                "the column duration says %g where a clip is %g s long: durations are read from the audio instead",
                values[row],
                measured,
            )
            return None
    return seconds


def table_of(columns: dict) -> Dataset:
    return Dataset(pyarrow.table(columns))


def beside(rows: Dataset, columns: dict) -> Dataset:
    """Rows with further columns; id, audio, text come first and duration last."""
    rows = concatenate_datasets([rows, table_of(columns)], axis=1)
    first = [column for column in ("id", "audio", "text") if column in rows.column_names]
    last = [column for column in ("duration",) if column in rows.column_names]
    return rows.select_columns(
        [*first, *(column for column in rows.column_names if column not in (*first, *last)), *last]
    )
