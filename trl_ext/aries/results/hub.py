"""
Uploads to the Hugging Face Hub. The token is the Hub client's own: `hf auth login`, or `HF_TOKEN` in the environment.
"""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ...recipe import RecipeError
from ..children import ChildError


def make_repo(repo: str, kind: str, private: bool) -> None:
    """
    Make a `"model"` or `"dataset"` repository unless it exists, so that a missing permission shows before any work.

    Raises:
        [`RecipeError`]: the name is not valid, or the Hub cannot be reached or refuses.
    """
    try:
        validate_repo_id(repo)
        HfApi().create_repo(repo, repo_type=kind, private=private, exist_ok=True)
    except HFValidationError as error:
        raise RecipeError(f"--push_to_hub: {error}") from error
    except (httpx.HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise RecipeError(
            f"--push_to_hub: the {kind} {repo} cannot be made: {error}. Log in with `hf auth login`, or export HF_TOKEN. Without "
            "--push_to_hub, everything stays on this machine."
        ) from error


def upload(folder: Path, repo: str, kind: str) -> str:
    """
    Upload a directory to a repository, and return the URL of the commit.

    Raises:
        [`~aries.children.ChildError`]: the upload failed; the directory stays.
    """
    try:
        return HfApi().upload_folder(
            repo_id=repo, folder_path=folder, repo_type=kind, commit_message="Upload with trl-ext"
        )
    except (httpx.HTTPError, OSError) as error:
        raise ChildError(
            f"{folder} was written but not uploaded: {error}. To try again: hf upload {repo} {folder} --repo-type {kind}"
        ) from error
