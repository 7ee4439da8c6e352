"""Audio files → text, JSON or subtitles."""

import itertools
import json
import logging
import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from tqdm.auto import tqdm

from .command_line import option, parse_arguments
from .data.audio import AudioError
from .data.folders import AUDIO_SUFFIXES, is_unicode, warn_of_dead_links, warn_of_unread
from .decoding import DecodingArguments, Transcript, Word, join_transcripts
from .recognizer import ComputingArguments, SpeechRecognizer
from .recordings import RecordingArguments

logger = logging.getLogger(__name__)

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}
CUE_CHARACTERS, CUE_LINES = 42, 2  # of a subtitle
CUE_SECONDS, CUE_PAUSE = 6.0, 0.6
CUE_LINGERS = 0.4  # seconds that a subtitle stays on after its last word, if none follows
LONGEST_WORD = 30  # characters, where words have spaces between them

DESCRIPTION = """Transcribe audio files of any length. MODEL and FILEs come first, options after them; a FILE may be a
folder.

    python -m hf_speechcl transcribe runs/ctc speech.wav
    python -m hf_speechcl transcribe runs/ctc recordings/ --format srt --output_dir subtitles
    python -m hf_speechcl transcribe user/name talk.flac --beam_width 100 --lm lm.arpa --hot_words nairobi kibera

MODEL is a folder, or user/name or user/name@revision on the Hub, of this package or any that transformers' pipeline
takes. Without output_dir, the transcripts are printed: a line for each file in text and JSON. Files that cannot be read
are named and left out, and the exit status is then 1."""


@dataclass
class TranscriptionArguments:
    model: str = option("", "MODEL: folder of a speech recogniser, or user/name or user/name@revision on the Hub.")
    files: list[str] = option([], "FILE: audio files and folders of them.")
    format: str = option("text", f"One of {', '.join(SUFFIXES)}.")
    output_dir: str | None = option(None, "Folder for a file of each transcript; printed by default.")
    trust_remote_code: bool = option(False, "Run the code that comes with a model; those of this package need none.")

    def __post_init__(self):
        if not self.model or not self.files:
            raise ValueError("expected MODEL FILE …, and options after them")
        if self.format not in SUFFIXES:
            raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, found {self.format!r}")


@dataclass
class Cue:
    """A subtitle."""

    start: float
    end: float
    text: str


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model, *files = [*takewhile(lambda argument: not argument.startswith("-"), argv)] or [None]
    if model is not None:
        argv = ["--model", model, *(["--files", *files] if files else []), *argv[1 + len(files) :]]
    try:
        args, computing, decoding, recording = parse_arguments(
            [TranscriptionArguments, ComputingArguments, DecodingArguments, RecordingArguments], DESCRIPTION, argv
        )
        recordings = find_recordings(args.files)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.output_dir is None and args.format in ("srt", "vtt") and len(recordings) > 1:
        sys.exit(f"error: {len(recordings)} files: --format {args.format} needs --output_dir")
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        if args.output_dir is not None:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            if not os.access(args.output_dir, os.W_OK):
                raise PermissionError(f"output_dir: nothing may be written into {args.output_dir}")
        recognizer = SpeechRecognizer.from_pretrained(
            args.model,
            device=computing.device,
            dtype=computing.dtype,
            decoding=decoding,
            trust_remote_code=args.trust_remote_code,
        )
        recognizer.chunk(recording.chunk_seconds)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    stems = Counter(Path(name).with_suffix("") for name in recordings)
    num_bad = 0
    for name, file in recordings.items():
        if not is_unicode(str(file)):
            logger.error("skipped %s: its name is not UTF-8, rename it", ascii(name))
            num_bad += 1
            continue
        try:
            utterances = _transcribe(recognizer, name, file, recording)
        except AudioError as error:
            logger.error("skipped %s: %s", name, error)
            num_bad += 1
            continue
        output = render(name, utterances, args.format)
        if args.output_dir is not None:
            stem = Path(name).with_suffix("")
            whole = stem if stems[stem] == 1 else Path(name)  # talk.wav and talk.flac do not share a transcript
            target = Path(args.output_dir, f"{whole}{SUFFIXES[args.format]}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(output, encoding="utf-8")
        elif args.format == "text" and len(recordings) > 1:
            print(f"{name}: {output}", end="", flush=True)
        else:
            print(output, end="", flush=True)
    if num_bad:
        sys.exit(f"error: {num_bad} of {len(recordings)} files could not be transcribed")


def find_recordings(files: list[str]) -> dict[str, Path]:
    """Audio files by the name that their transcripts bear: relative to a folder that was given, or their own.

    Raises:
        FileNotFoundError: no such file or folder, or no audio in it.
        ValueError: transcripts of two files would bear the same name.
    """
    recordings: dict[str, Path] = {}
    for given in map(Path, files):
        if given.is_dir():
            paths_below = sorted(given.rglob("*"))
            dead = [path for path in paths_below if path.is_symlink() and not path.exists()]
            warn_of_dead_links(given, [link.relative_to(given).as_posix() for link in dead])
            files_below = [path for path in paths_below if path.is_file()]
            found = [file for file in files_below if file.suffix.lower() in AUDIO_SUFFIXES]
            warn_of_unread(given, Counter(file.suffix.lower() for file in files_below))
            if not found:
                raise FileNotFoundError(f"no audio files in {given}; expected {' '.join(sorted(AUDIO_SUFFIXES))}")
            names = [file.relative_to(given).as_posix() for file in found]
        elif given.is_file():
            found, names = [given], [given.name]
        else:
            raise FileNotFoundError(f"no file or folder {given}")
        recordings.update((name, file) for name, file in zip(names, found) if recordings.get(name, file) == file)
        if clash := [name for name, file in zip(names, found) if recordings[name] != file]:
            raise ValueError(f"{clash[0]}: two files of this name; transcribe them in turn")
    return recordings


def _transcribe(
    recognizer: SpeechRecognizer, name: str, file: Path, recording: RecordingArguments
) -> list[tuple[float, float, Transcript]]:
    with tqdm(desc=name, total=0, unit="s", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s") as bar:

        def progress(done: float, total: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return list(recognizer.transcribe_utterances(file, recording, progress))


def render(name: str, utterances: list[tuple[float, float, Transcript]], format: str) -> str:
    """A file's transcript as it is printed or written.

    Args:
        name: of the file, for JSON.
        utterances: of `SpeechRecognizer.transcribe_utterances`.
        format: "text", "json", "srt" or "vtt".
    """
    whole = join_transcripts(transcript for _, _, transcript in utterances)
    if format == "text":
        return whole.text + "\n"
    if format == "json":
        words = whole.words and [
            {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(word).items()}
            for word in whole.words
        ]
        parts = [
            {"start": round(start, 3), "end": round(end, 3), "text": transcript.text}
            for start, end, transcript in utterances
        ]
        return (
            json.dumps(
                {"file": name, "text": whole.text, "confidence": whole.confidence, "words": words, "utterances": parts},
                ensure_ascii=False,
            )
            + "\n"
        )
    cues = make_cues(utterances)
    if format == "srt":
        blocks = [
            f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
            for number, cue in enumerate(cues, 1)
        ]
        return "\n".join(blocks)
    escaped = [cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for cue in cues]
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n" for cue, text in zip(cues, escaped)]
    return "\n".join(["WEBVTT\n", *blocks])


def make_cues(utterances: Iterable[tuple[float, float, Transcript]]) -> list[Cue]:
    """Subtitles: words up to a pause, two lines or six seconds; whole utterances where words have no times. A word
    that is more than a word, as in scripts without spaces, is divided evenly."""
    cues: list[Cue] = []
    for begin, finish, transcript in utterances:
        if transcript.words is None:
            if transcript.text:
                cues.append(Cue(begin, finish, transcript.text))
            continue
        first = True
        for word in itertools.chain.from_iterable(map(_divide, transcript.words)):
            text = word.text if first else f"{cues[-1].text} {word.text}"
            if (
                first
                or word.start - cues[-1].end > CUE_PAUSE
                or word.end - cues[-1].start > CUE_SECONDS
                or len(textwrap.wrap(text, CUE_CHARACTERS)) > CUE_LINES
            ):
                cues.append(Cue(word.start, word.end, word.text))
            else:
                cues[-1].end, cues[-1].text = word.end, text
            first = False
    for cue, following in zip(cues, [*cues[1:], None]):
        cue.text = "\n".join(textwrap.wrap(cue.text, CUE_CHARACTERS))
        cue.end = cue.end + CUE_LINGERS if following is None else min(cue.end + CUE_LINGERS, following.start)
    return cues


def _divide(word: Word) -> list[Word]:
    """Parts of a word that are no longer than a cue may be."""
    seconds, size = word.end - word.start, len(word.text)
    num_parts = max(math.ceil(size / (CUE_LINES * CUE_CHARACTERS)), 1)
    if size > LONGEST_WORD:
        num_parts = max(num_parts, math.ceil(seconds / CUE_SECONDS))
    places = [size * part // num_parts for part in range(num_parts + 1)]
    times = [word.start + seconds * place / max(size, 1) for place in places]
    return [
        Word(word.text[first:last], start, end, word.confidence)
        for (first, last), (start, end) in zip(itertools.pairwise(places), itertools.pairwise(times))
    ]


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
