"""Models go to the Hub and come from it."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from yaml import YAMLError

from .cards import CARD, error_rate_results, fill_results, rename_model, result_key
from .configuration_speechcl import SpeechCLConfig
from .curves import CURVES
from .modeling_speechcl import REMOTE_CODE

logger = logging.getLogger(__name__)

STARTER = Path(__file__).with_name("starter")  # the encoder that comes with the package
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
CODE = ("configuration_speechcl.py", "modeling_speechcl.py")
RESULTS = "results.json"  # of the validation after training
# All that goes to the Hub. Pickles, optimizer states, options and reports that name clips do not.
PUBLISHED = (
    WEIGHTS,
    "model-*-of-*.safetensors",
    WEIGHTS_INDEX,
    "config.json",
    *CODE,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "prototypes.safetensors",
    "classes.json",
    RESULTS,
    CURVES,
    CARD,
)
DOWNLOADED = ("*.safetensors", "*.json", "*.py", "*.txt", "*.model")  # nothing that would have to be unpickled
RETRY_SECONDS = (1, 2, 4, 8, 16)


def may_be_model(name: str) -> bool:
    """Whether `find_model` may find something by that name, without asking the Hub."""
    return Path(name).is_dir() or name == STARTER.name or "/" in name


def weights_digest(model: torch.nn.Module) -> str:
    """What tells a model's weights from others, whatever folder they are in."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_model(name: str | Path) -> str:
    """The folder of a model: a local one as it is, one on the Hub as its download, `starter` as that of the package.

    Args:
        name: a folder, or `user/name` on the Hub, or `user/name@revision` with a branch, a tag or a commit; or
            `starter`, the encoder that comes with the package.

    Raises:
        ValueError: it is a checkpoint of training with adapters, which are not merged into its weights.
        FileNotFoundError: no such folder, repository or revision; or the Hub cannot be reached and it is not in the
            cache.
    """
    if Path(name).is_dir():
        _refuse_adapters(Path(name))
        return str(name)
    if str(name) == STARTER.name:
        return str(STARTER)
    repo_id, _, revision = str(name).partition("@")
    try:
        return snapshot_download(repo_id, revision=revision or None, allow_patterns=list(DOWNLOADED))
    except HFValidationError:
        raise FileNotFoundError(f"no folder {name} here, and no Hub name, which is user/name") from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{repo_id} has no branch, tag or commit {revision!r}") from None
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then log in there with `hf "
            "auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no folder {name} here, and no such model on the Hub; if it is private, log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no folder {name} here, and the Hub cannot be reached, nor was it downloaded before: {error}"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise FileNotFoundError(
            f"no folder {name} here, and the Hub does not know your token: log in with `hf auth login` again"
        ) from error


def read_config(name: str, folder: str, **options) -> SpeechCLConfig:
    """Configuration of a model of this package.

    Args:
        name: of the model, as it was given.
        folder: that it is in.
        options: fields to change.

    Raises:
        ValueError: it is a model of another kind.
        huggingface_hub.errors.StrictDataclassError: fields that no model can have.
    """
    config = AutoConfig.from_pretrained(folder, **options)
    if not isinstance(config, SpeechCLConfig):
        raise ValueError(f"{name} is a {config.model_type} model: expected one that hf_speechcl pre-trained")
    config.validate()  # transformers does so before it changes fields
    return config


def _refuse_adapters(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        return
    try:
        with safe_open(folder / WEIGHTS, framework="np") as weights:
            names = list(weights.keys())
    except SafetensorError:  # whoever loads it says so
        return
    if any(".lora_A." in name for name in names):
        raise ValueError(
            f"{folder} holds low-rank adapters that are not merged into its weights: it serves to go on with its "
            "training; the folder of a finished run is an ordinary model"
        )


def _is_of_training(file: Path) -> bool:
    """Whether results are those of a training; others, such as scripts/evaluate.py writes, may name clips and texts,
    which the log says."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if is_of_training := isinstance(results, dict) and "transcripts" not in results:
        return is_of_training
    logger.warning("%s is not published: no training wrote it, and it may name clips and texts", file.name)
    return False


def published_files(folder: str | Path) -> list[Path]:
    """The files of a model folder that go to the Hub.

    Raises:
        FileNotFoundError: something that a published model needs is missing.
        ValueError: it holds two models, its configuration does not say which class of the shipped files is for what, or
            its card cannot be read.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*") if path.is_file())
    files = [path for path in found if any(fnmatchcase(path.name, pattern) for pattern in PUBLISHED)]
    files = [path for path in files if path.name != RESULTS or _is_of_training(path)]
    names = {path.name for path in files}
    if not names & {WEIGHTS, WEIGHTS_INDEX}:
        others = ", ".join(path.name for path in found[:8]) or ("no files" if folder.is_dir() else "no folder")
        raise FileNotFoundError(f"no model in {folder}: expected {WEIGHTS}, found {others}")
    weights = {WEIGHTS}
    if WEIGHTS_INDEX in names:
        index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
        shards = {WEIGHTS_INDEX, *index["weight_map"].values()}
        if WEIGHTS in names and shards <= names:
            raise ValueError(f"{folder} holds {WEIGHTS} and {WEIGHTS_INDEX} with its parts: delete what is the older")
        weights = weights if WEIGHTS in names else shards
    if missing := sorted({"config.json", *CODE, *weights} - names):
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: save the model with save_pretrained again")
    if CARD not in names:
        raise FileNotFoundError(
            f"{folder} has no {CARD}: a model goes to the Hub with its card, which the training scripts write when a "
            "run ends; in a checkpoint's folder, write one"
        )
    try:
        ModelCard.load(folder / CARD)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{folder / CARD}: its metadata cannot be read: {error}") from None
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    if missing := sorted(set(REMOTE_CODE.items()) - set(auto_map.items())):
        raise ValueError(
            f"auto_map of {folder / 'config.json'} lacks {', '.join(key for key, _ in missing)}, and the model would "
            "not load by trust_remote_code: save it with save_pretrained of a class of hf_speechcl"
        )
    return [path for path in files if path.name in weights or not fnmatchcase(path.name, "model*.safetensors*")]


def prepare_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, tag: str | None = None, token=None
) -> str:
    """Make a repository that can be published to, or say why there is none.

    One that is there already is used again if it is empty or holds a model of this package.

    Args:
        repo_id: `user/name`, or `name` for the user of the token.
        private: who may see it; without, the default of the account.
        revision: a branch, made from main where it is not there yet.
        tag: must not be there yet.
        token: without, that of `hf auth login` or HF_TOKEN.

    Returns:
        `user/name`.

    Raises:
        ConnectionError: the Hub cannot be reached.
        PermissionError: no token, or one that may not write there.
        FileExistsError: the repository or tag is there and is something else.
        ValueError: no name for a repository.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        validate_repo_id(repo_id)
        user = _retry(api.whoami)
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PermissionError(
                "this token of the Hub can only read: make one that can write at https://huggingface.co/settings/tokens"
            )
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        if repo_id.split("/")[0] not in owners:
            raise PermissionError(
                f"{repo_id} would belong to {repo_id.split('/')[0]}, and this token to {', '.join(owners)}: publish as "
                f"{user['name']}/{repo_id.split('/')[1]}"
            )
        _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        _retry(lambda: api.auth_check(repo_id, write=True))
        info = _retry(lambda: api.model_info(repo_id))
        if private is not None and info.private != private:
            raise FileExistsError(
                f"{repo_id} is there already and is {'private' if info.private else 'public'}: change that in its "
                "settings on the Hub, or leave the option out"
            )
        others = {file.rfilename for file in info.siblings} - {".gitattributes", CARD}
        if others and (info.config or {}).get("model_type") != "speechcl":
            raise FileExistsError(
                f"{repo_id} is there already and holds no model of hf_speechcl, but {', '.join(sorted(others)[:5])}: "
                "publish under another name"
            )
        references = _retry(lambda: api.list_repo_refs(repo_id))
        if tag in [known.name for known in references.tags]:
            raise FileExistsError(f"{repo_id} has a tag {tag} already: give another, or leave it out")
        if revision and revision not in [branch.name for branch in references.branches]:
            _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return repo_id


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model folder, in one commit, and name it in its card as it is named on the Hub.

    What the Hub has already is not sent again, so an interrupted upload goes on when it is started again. Files of an
    earlier model that the folder does not have are deleted there; other files of the repository stay.

    Args:
        folder: with weights, configuration and card; see `published_files`.
        repo_id, private, revision, tag, token: as for `prepare_repository`.

    Returns:
        Address of the commit.

    Raises:
        As `published_files` and `prepare_repository`; ValueError: the Hub does not accept the card.
    """
    files = published_files(folder)
    repo_id = prepare_repository(repo_id, private=private, revision=revision, tag=tag, token=token)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as stage, _explained(repo_id):
        for file in files:
            if file.name == CARD:
                card = rename_model(file.read_text(encoding="utf-8"), repo_id)
                Path(stage, CARD).write_text(card, encoding="utf-8")
            else:
                Path(stage, file.name).symlink_to(file.resolve())

        def upload():
            try:
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=stage,
                    revision=revision,
                    commit_message=commit_message or "Model of hf_speechcl",
                    delete_patterns=list(PUBLISHED),
                )
            except RuntimeError as error:  # what failed on the way of large files is behind it
                raise error.__cause__ or error from None

        commit = _retry(upload)
        if tag:
            _retry(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True))
    return commit.commit_url


def add_results(folder: str | Path, results: dict) -> None:
    """Add what scripts/evaluate.py found to the card of a model: to its model-index and to its table of results.

    Results on the same corpora, split, normalisation and decoding replace those that the card has.

    Args:
        folder: of the model, with its card.
        results: the JSON of scripts/evaluate.py: corpus, split, clips, hours, text_normalization, decoding, and wer and
            cer, shares, each with `_low` and `_high`.

    Raises:
        FileNotFoundError: no card.
    """
    file = Path(folder) / CARD
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CARD} to add results to")
    card = ModelCard.load(file)
    new = error_rate_results(results)
    replaced = set(map(result_key, new))
    kept = [old for old in card.data.eval_results or [] if result_key(old) not in replaced]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or Path(folder).name
    card.text = fill_results(card.text, card.data.eval_results)
    card.save(file)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub's client as errors that say what to do."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a repository, which is user/name: {error}") from None
    except OfflineModeIsEnabled:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be published: unset it") from None
    except LocalTokenNotFoundError:
        raise PermissionError(
            "no token of the Hub: make one that can write at https://huggingface.co/settings/tokens, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError("the Hub does not know this token: log in with `hf auth login` again") from error
        if status == 403:
            raise PermissionError(
                f"this token may not write to {repo_id}: give it that right at https://huggingface.co/settings/tokens, "
                "or publish under another name"
            ) from error
        if status >= 500:
            raise ConnectionError(
                f"the Hub is in trouble ({status}): try again later, what it has is not sent again"
            ) from error
        raise
    except HTTPError as error:
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} cannot be reached: {error}") from error


def _retry(call: Callable):
    """Call until the Hub answers, with growing pauses; refusals are not asked about again."""
    for seconds in RETRY_SECONDS:
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise
            problem = error.response.status_code
        except HTTPError as error:
            problem = type(error).__name__
        logger.warning("the Hub does not answer (%s): again in %d s", problem, seconds)
        time.sleep(seconds)
    return call()
