"""Fetch data sets by name through `datasets`, and keep each as one parquet file beside its cache.

    hf://owner/name, subset, split, revision -> datasets -> its cache -> <cache>/opd_async/<name>-<fingerprint>.parquet

Which hub, which token, which cache and whether anything may be fetched is what `datasets` and huggingface_hub say:
`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from opd_async.data.hub import quiet_client, reason
from opd_async.errors import InputError
from opd_async.extras import need

SCHEME = "hf:"
EXTRA = "datasets"
_GATED = (
    "its owner lets in only those who accepted the conditions; accept them on the data set's page, and put a token of "
    "that account into HF_TOKEN, or log in with: hf auth login"
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_data_set(path: Path) -> bool:
    """Tell whether a path names a data set of the hub: `hf://owner/name`, of which a path keeps one slash."""
    return path.parts[:1] == (SCHEME,)


def name_of(path: Path) -> str:
    """The `owner/name` of such a path. Raises `InputError` if it has another form."""
    name = "/".join(path.parts[1:])
    if _NAME.fullmatch(name) is None:
        raise InputError(f"hf://{name} is no name of a data set; write hf://owner/name, and split, subset beside it")
    return name


def fetch_data_set(path: Path, *, subset: str | None, split: str, revision: str | None) -> Path:
    """Fetch one split of a data set, or find it in the cache; returns the parquet file that holds its rows.

    Raises `InputError` that says whether the extra is missing, there is no such data set, subset or split, its owner
    does not let everybody in, or why it cannot be fetched.
    """
    name = name_of(path)
    datasets = need("datasets", EXTRA, f"hf://{name}: a data set of the hub")
    quiet_client()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    at = f"hf://{name} at revision {revision}" if revision else f"hf://{name}"
    unreachable = _question(name, revision, at)
    try:
        with _offline(datasets.config) if unreachable else nullcontext():
            rows = datasets.load_dataset(name, subset, split=split, revision=revision)
        return _as_file(rows, name, Path(datasets.config.HF_DATASETS_CACHE) / "opd_async")
    except Exception as error:  # the library's own errors have no common base; whatever it raises, nothing was started
        raise InputError(f"{at}: {_words(error, unreachable)}") from None


def _question(name: str, revision: str | None, at: str) -> str | None:
    """Ask the hub for the data set once: `datasets` would ask a hub that is away for half a minute.

    Returns why the hub could not be asked, None if it answered. Raises `InputError` where it has no such data set.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi().dataset_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.GatedRepoError:
        raise InputError(f"{at}: {_GATED}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{at}: the hub has the data set, and no such revision; correct it") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{at}: the hub ({constants.ENDPOINT}) shows no data set of this name; correct the name, or log in "
            "where it is private"
        ) from None
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE forbids to fetch it; fetch it once without that"
    except Exception as error:  # of whichever HTTP client the library has
        return (
            f"the hub ({constants.ENDPOINT}) could not be reached: {reason(error)}; check the network, or HF_ENDPOINT, "
            "or write the path of a file"
        )
    return None


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Within the block `datasets` looks into its cache only."""
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _as_file(rows: Any, name: str, folder: Path) -> Path:
    """Write the rows once; the file's name has the fingerprint that the library gives their content."""
    file = folder / f"{name.replace('/', '--')}-{rows._fingerprint}.parquet"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            rows.to_parquet(str(partial))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return file


def _words(error: Exception, unreachable: str | None) -> str:
    """What happened and what to do, for an error of the library."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "gated" in said:
        return _GATED
    if "Unknown split" in said:
        return f"{said}; write one of these under split"
    if "BuilderConfig" in said or "Config name is missing" in said:
        return f"{said}; write one of these under subset"
    if unreachable is not None:
        return f"it is not in the cache, and {unreachable}"
    return f"cannot be read: {said}; give a data set of the forms that `datasets` reads, or a file"
