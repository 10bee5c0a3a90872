"""Upload an exported folder to the hub, and see before training that this will be allowed."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError

from trainer.errors import UserError, one_line
from trainer.json_files import read_object
from trainer.model.own_files import require_own


def check_login(option: str) -> None:
    """Raise UserError, which names `option`, unless somebody is logged in at the hub."""
    try:
        HfApi(endpoint=constants.ENDPOINT).whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"{option}: expected a login at {constants.ENDPOINT}, found no token; log in with `hf auth login`, or set HF_TOKEN"
                        ) from None
    except Exception as error:  # of the network, the hub, or the client
        raise UserError(f"{option}: cannot log in at {constants.ENDPOINT}: {reason(error)}; check the token and the network") from None


def push(option: str, folder: Path, name: str, public: bool) -> str:
    """Upload a folder to a repository, which is made if there is none, and return its address.

    Raises UserError, which names `option`, if it fails, or for a link out of the folder. The folder stays as it is.
    """
    for path in sorted(folder.rglob("*")):
        require_own(option, path, folder)
    hub = HfApi(endpoint=constants.ENDPOINT)
    try:
        repository = hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a model trained with Steadfast")
    except Exception as error:  # of the network, the hub, or the client
        raise UserError(f"{option}: cannot upload {folder} to {name}: {reason(error)}") from None
    return str(repository)


def base_folder(folder: Path) -> str | None:
    """Return the folder of this machine that an adapter names as its base, which others do not have.

    Returns None where it names one on the hub.
    """
    config = folder / "adapter_config.json"
    base = read_object("folder", config).get("base_model_name_or_path") if config.is_file() else None
    return base if isinstance(base, str) and Path(base).exists() else None


def reason(error: Exception) -> str:
    """Return an error of the hub's client on one line, without tokens, which its text has none of."""
    return one_line(f"{type(error).__name__}: {error}")
