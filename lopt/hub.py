"""Meta-parameters from and to the Hugging Face Hub: one safetensors file in a model repository, or in a folder.

Needs huggingface_hub, which `pip install "lopt[huggingface]"` brings, for anything but a folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FILE = "metaparams.safetensors"
TIMEOUT = 10.0  # seconds until a hub that does not answer counts as out of reach


def find(name: str | os.PathLike[str], *, file: str, revision: str | None, token: str | bool | None) -> Path:
    """Path of a file in a folder, or of a copy in the cache of the one in a repository; that of a file is itself.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no such file in it.
        ConnectionError: the hub cannot be reached and the file is not in the cache.
        ImportError: it is no folder, and huggingface_hub is not installed.
        ValueError: the name is neither a folder nor that of a repository.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(name)!r} holds no {file}: write one with MetaParams.save")
        return path
    if Path(name).is_file():
        return Path(name)
    repository = os.fspath(name)
    hub, errors = _hub()
    try:
        # Asked first: a download would try again for half a minute before it gives up.
        found = hub.HfApi(token=token).model_info(repository, revision=revision, timeout=TIMEOUT)
        return Path(hub.hf_hub_download(repository, file, revision=found.sha, token=token))
    except errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is neither a folder nor the name of a repository: {error}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        which = repository if revision is None else f"{repository} at revision {revision!r}"
        raise FileNotFoundError(
            f"the hub has no repository {which}, or it is private: check the name, or log in ({_line(error)})"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repository, error) from error
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"repository {repository} holds no {file}: write one with push_to_hub") from None
    except Exception as error:  # of requests or httpx, by version of huggingface_hub
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision, local_files_only=True))
        except errors.EntryNotFoundError:
            raise _unreachable(repository, error) from error


def push(path: Path, repository: str, *, file: str, private: bool, token: str | bool | None, message: str) -> str:
    """Upload a file of meta-parameters to a repository, made if there is none. Returns the address of the commit.

    Raises:
        ConnectionError: the hub cannot be reached, or refuses: the message says why. Nothing was uploaded.
        ImportError: huggingface_hub is not installed.
        ValueError: the name is not that of a repository.
    """
    hub, errors = _hub()
    api = hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_file(path_or_fileobj=path, path_in_repo=file, repo_id=repository, commit_message=message)
    except errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is not the name of a repository: {error}") from None
    except Exception as error:  # of requests or httpx, by version of huggingface_hub
        raise _unreachable(repository, error) from error
    return str(commit.commit_url)


def _hub() -> tuple[Any, Any]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise ImportError(
            "huggingface_hub is not installed; it reads and writes repositories of the Hugging Face Hub: "
            'pip install "lopt[huggingface]"'
        ) from None
    return huggingface_hub, errors


def _unreachable(repository: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the Hugging Face Hub did not serve repository {repository} ({type(error).__name__}: {_line(error)}): "
        f"check the connection and `hf auth login`, or pass the path of a file or folder"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
