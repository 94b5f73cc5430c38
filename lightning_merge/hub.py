"""Folders on the Hugging Face hub: push one, or fetch one into the local cache."""

from pathlib import Path

FILES = ("*.json", "*.safetensors", "*.md", "*.png")
"""What a merged model's folder holds; nothing else is fetched."""


def push_folder(
    folder: Path, repo_id: str, *, private: bool, token: str | None, message: str
) -> str:
    """Upload a folder as one commit to a model repository, which is made if there is none.

    Args:
        folder: The folder.
        repo_id: ``OWNER/NAME``.
        private: Whether a new repository is private.
        token: Access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        message: Commit message.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the name is no repository's, or the hub refuses; nothing is half uploaded.
    """
    # imported where it is used: with its HTTP client it takes as long as all the rest of ours
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"the hub does not take '{repo_id}': {error}. A repository is OWNER/NAME, and you need "
            "a token with write access to it (hf auth login)."
        ) from error
    return str(commit.commit_url)


def fetch_folder(
    repo_id: str, *, revision: str | None, token: str | None, cache_dir: str | Path | None
) -> Path:
    """Fetch a model repository's files, or find them in the cache.

    Without a connection (or with ``HF_HUB_OFFLINE=1``) an earlier download serves.

    Raises:
        ValueError: If there is no such repository, or neither a connection nor an earlier download.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(FILES),
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ValueError(
            f"cannot fetch '{repo_id}' from the hub: {error}. Check its name, your token for a "
            "private repository, and the connection; a local folder is read by MergedModel.load."
        ) from error
    return Path(found)
