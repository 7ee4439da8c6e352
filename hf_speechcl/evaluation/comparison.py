"""Two models on the same clips."""

import json
from pathlib import Path

from .asr import edit_counts, paired_bootstrap

NEEDED = {"model", "decoding", "text_normalization", "clips_skipped", "transcripts"}


def read_other_results(file: str, normalization: str) -> dict:
    """Results to compare with.

    Raises:
        ValueError: no results, or texts normalised in another way.
    """
    try:
        other = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"compare_with: {file} cannot be read ({error})") from None
    if not isinstance(other, dict) or not NEEDED <= other.keys():
        found = ", ".join(sorted(NEEDED - set(other))) if isinstance(other, dict) else "everything"
        raise ValueError(f"compare_with: {file} lacks {found}; expected an output_file of this script")
    if other["text_normalization"] != normalization:
        raise ValueError(
            f"compare_with: {file} was scored with text_normalization {other['text_normalization']}, this run is with "
            f"{normalization}: they must be the same"
        )
    return other


def check_same_clips(other: dict, references: dict[str, str], file: str) -> None:
    """Raise ValueError unless other results are of the clips and references of this run.

    Clips that the other run could not decode are left out here: this one will not decode them either.
    """
    references = {name: text for name, text in references.items() if name not in other["clips_skipped"]}
    theirs = {clip["id"]: clip["reference"] for clip in other["transcripts"]}
    if different := sorted(name for name in {*theirs, *references} if theirs.get(name) != references.get(name)):
        raise ValueError(
            f"compare_with: {file} is of {len(theirs)} clips, this run of {len(references)}, and {len(different)} are "
            f"not in both with the same reference, such as {', '.join(different[:3])}: score both on the same split"
        )


def compare(transcripts: list[dict], other: dict) -> dict:
    """Differences of WER and CER to another model's results, over the clips that both could decode.

    Returns:
        `model` and `decoding` of the other; the number of `clips`; and for `wer` and `cer` the `other`
        model's and what `paired_bootstrap` gives.
    """
    theirs = {clip["id"]: clip["hypothesis"] for clip in other["transcripts"]}
    shared = [clip for clip in transcripts if clip["id"] in theirs]
    references = [clip["reference"] for clip in shared]
    comparison = {name: other[name] for name in ("model", "decoding")} | {"clips": len(shared)}
    for name, characters in (("wer", False), ("cer", True)):
        counts = edit_counts(references, [clip["hypothesis"] for clip in shared], characters)
        others = edit_counts(references, [theirs[clip["id"]] for clip in shared], characters)
        comparison[name] = {"other": float(others[:, 0].sum() / others[:, 1].sum()), **paired_bootstrap(counts, others)}
    return comparison
