"""How the scripts read their options: dataclasses, a YAML file, the command line."""

import argparse
import json
import sys
from dataclasses import field
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


def option(default, help: str):
    """A dataclass field with a help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def parse_arguments(types: list[type], description: str, argv: list[str] | None = None) -> tuple:
    """Read options from the command line, over those of `--config file.yaml`, over the defaults.

    Returns:
        One instance of each of `types`. A wrong option ends the program with a message that names it.
    """
    parser = HfArgumentParser(
        types,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with options; the command line overrides it.")
    argv = sys.argv[1:] if argv is None else argv
    config, _ = _config_parser().parse_known_args(argv)
    if config.config:
        argv = _read_config(parser, Path(config.config)) + argv
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)} (see --help)")
    return tuple(parsed)


class _Loader(yaml.SafeLoader):
    """Takes true and false alone for truth values, as YAML 1.2 does: `no` may be an answer, or Norwegian."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if first in "tTfF" or not pair[0].endswith(":bool")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _read_config(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The options of a YAML file as they would stand on the command line."""
    if not file.is_file():
        parser.error(f"--config {file}: no such file")
    try:
        options = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {file}: not YAML ({error})")
    if not isinstance(options, dict):
        parser.error(f"--config {file}: expected OPTION: VALUE lines, found {type(options).__name__}")
    # Of a truth value whose default is true there is an action --no_NAME too, after its own.
    defaults = {action.dest: action.default for action in reversed(parser._actions)}
    if unknown := sorted(set(options) - set(defaults)):
        parser.error(f"--config {file}: unknown options: {', '.join(unknown)} (see --help)")
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    are_lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    argv = []
    for name, value in options.items():
        if value is None:
            if defaults[name] is not None and type(None) not in get_args(hints.get(name)):
                parser.error(f"--config {file}: {name} is null, which is no value for it: leave it out")
            parser.set_defaults(**{name: None})
        elif value != defaults[name]:
            if isinstance(value, dict):
                pairs = [f"{key}={json.dumps(part)}" for key, part in value.items()]
                value = pairs if name in are_lists else json.dumps(value)
            if value != defaults[name]:
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def parse_assignments(assignments: list[str], field: str) -> dict:
    """`["a=1", "b.c=x"]` → `{"a": 1, "b.c": "x"}`, values read as YAML."""
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"{field}: expected NAME=VALUE, found {assignment!r}")
        try:
            number = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{field}: {assignment!r} is not YAML ({error})") from None
        try:  # YAML takes 1e-3, without a point, for a string
            values[name] = float(number) if isinstance(number, str) else number
        except ValueError:
            values[name] = number
    return values
