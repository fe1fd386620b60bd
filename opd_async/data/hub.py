"""Fetch models and data sets by name from the Hugging Face hub, into the user's own cache.

A path that is no folder here, and has the form `owner/name`, names a model on the hub. Which hub, which token, which
cache and whether anything may be fetched at all is what huggingface_hub says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`,
`HF_HUB_OFFLINE`. What was fetched once is found in the cache, where one more run costs a question or two.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from opd_async.data.weight_files import file_problems
from opd_async.errors import InputError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
"""What is fetched of a model; weights in other formats are not read here."""
CONFIG_FILES = ["*.json", "*.jinja"]
"""Enough to plan for a model; its index of weights is among them."""
_CACHED = re.compile(r"models--(.+?)--(.+)")
"""What the cache calls the folder of a model; no name of the hub has two hyphens side by side."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(path: Path) -> bool:
    """Tell whether a path names a model on the hub: it is `owner/name`, and there is no folder `owner` here."""
    return _NAME.fullmatch(str(path)) is not None and not path.parent.exists()


def fetch_model(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Fetch a model, or find it in the cache; returns its folder there. Without `weights` only its small files.

    `revision` is a branch, a tag or a commit; None stands for the main branch. Raises `InputError` that says whether
    there is no such model, whether it wants a licence to be accepted, or why it cannot be fetched.
    """
    return _fetch(name, revision, MODEL_FILES if weights else CONFIG_FILES)


def is_cached_model(folder: Path) -> bool:
    """Tell whether a folder is, or would be, a model in a hub's cache: `models--owner--name/snapshots/<commit>`."""
    return _cached_name(folder) is not None


def _cached_name(folder: Path) -> str | None:
    """The `owner/name` of the model that a folder of a hub's cache holds."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return None if cached is None else "/".join(cached.groups())


def named_model(folder: Path) -> str:
    """A model's folder for a message: by the name that it has on the hub, where it is one of a hub's cache."""
    name = _cached_name(folder)
    return str(folder) if name is None else f"{name} of the hub, commit {folder.name[:12]}"


def fetch_cached(folder: Path) -> None:
    """Fetch the model that `folder` of another host's cache holds into this host's, unless it is here.

    Raises `InputError` as `fetch_model`, and where this host's cache is another folder.
    """
    if not file_problems(folder, any_name=True):  # a fetch that broke off has left some of its files
        return
    name = _cached_name(folder)
    assert name is not None, folder
    found = fetch_model(name, folder.name)
    if found.absolute() != folder.absolute():
        raise InputError(
            f"{folder}: the launcher's host has the model there, and this host's cache is {found.parents[2]}; set "
            "HF_HOME alike on every host"
        )


def _fetch(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # takes half a second

    quiet_client()
    at = f"{name} at revision {revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError:
        raise InputError(
            f"{at}: its owner lets in only those who accepted the licence; accept it on the model's page, and put a "
            "token of that account into HF_TOKEN, or log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{at}: the hub has the model, and no such revision; write a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{at}: no such folder here, and the hub ({constants.ENDPOINT}) shows no model of this name; correct the "
            "name, or log in where it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{at}: no such folder here, it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; fetch it "
                f"once without that, with: hf download {name}"
            ) from None
        raise InputError(
            f"{at}: no such folder here, and the hub ({constants.ENDPOINT}) could not be reached: {reason(error)}; "
            "check the network, or HF_ENDPOINT, or write the path of a folder"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise InputError(f"{at}: cannot be fetched from the hub: {reason(error)}") from None


def quiet_client() -> None:
    """Have the HTTP client report no requests: huggingface_hub says what matters."""
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def reason(error: BaseException) -> str:
    """The first line of what an error, or the error behind it, says."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
