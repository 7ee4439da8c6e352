"""Publish a trained model on the Hugging Face Hub."""

import logging
import sys
from dataclasses import dataclass, field
from itertools import takewhile

from huggingface_hub.utils import validate_repo_id

from .command_line import option, parse_arguments
from .hub import publish, published_files

DESCRIPTION = """Publish a folder that a training script has written, so that its model loads by its name.

    python scripts/publish.py runs/mine user/name --dry_run True
    python scripts/publish.py runs/mine user/name --private True --tag v1

Weights, configuration, modelling files, processor, card, curves and results go there; optimizer states, options and
reports on clips do not. The token is that of `hf auth login` or of HF_TOKEN, and must be allowed to write. A repository
of yours that holds a model of this package, or nothing, is updated. An upload that was interrupted goes on when the
command is given again."""


@dataclass
class PublishArguments:
    folder: str = field(metadata={"help": "Folder of the model; first on the command line, without --folder."})
    name: str = field(metadata={"help": "user/name on the Hub; second on the command line, without --name."})
    private: bool | None = option(None, "Who may see a new repository; the default is that of the account.")
    revision: str | None = option(None, "Branch, made if it is not there yet; main if not given.")
    tag: str | None = option(None, "Name for this version, such as v1.")
    commit_message: str | None = option(None, "Message of the commit.")
    dry_run: bool = option(False, "Only say what would be uploaded, without asking the Hub.")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    given = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    named = [word for pair in zip(("--folder", "--name"), given) for word in pair]
    (args,) = parse_arguments([PublishArguments], DESCRIPTION, named + argv[len(given) :])
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        validate_repo_id(args.name)
        _publish(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _publish(args: PublishArguments) -> None:
    files = published_files(args.folder)
    print(f"{args.name}{f', branch {args.revision}' if args.revision else ''}:")
    for file in files:
        print(f"{file.stat().st_size:>14,} bytes  {file.name}")
    if args.dry_run:
        print("nothing was uploaded (--dry_run)")
        return
    print(
        publish(
            args.folder,
            args.name,
            private=args.private,
            revision=args.revision,
            tag=args.tag,
            commit_message=args.commit_message,
        )
    )
