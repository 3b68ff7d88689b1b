"""A packed dataset to a dataset repository of the Hugging Face Hub, in one commit, to be streamed from there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcir.errors import UserError


def prepare(repo: str, split: str, private: bool = False) -> None:
    """Make the repository where there is none: before the hours of packing. UserError: no token, no such owner, no
    network, or Parquet files of other splits there, which the new card would not list."""
    from huggingface_hub import HfApi

    with refusals(f"--push {repo}"):
        api = HfApi()
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        files = api.list_repo_files(repo, repo_type="dataset")
    if others := [file for file in files if file.endswith(".parquet") and not file.startswith(f"{split}-")]:
        raise UserError(f"--push {repo}: it holds {others[0]}; give each split a repository of its own")


def push(folder: Path, repo: str, split: str) -> str:
    """Upload shards and card in place of those of before; where they are now. UserError: the Hub refuses."""
    from huggingface_hub import HfApi

    with refusals(f"--push {repo}"):
        commit = HfApi().upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[f"{split}-*.parquet", "README.md"],
            delete_patterns=[f"{split}-*.parquet"],
            commit_message="Pack with mcir",
        )
    return str(commit.repo_url)


@contextmanager
def refusals(option: str) -> Iterator[None]:
    """What the Hub does not take as one sentence about the option that asked for it."""
    try:
        yield
    except Exception as error:  # of the network, the Hub, the token, the name
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{option}: the Hub does not take it ({said}); check the name, owner/name, the token (HF_TOKEN, or "
            "`hf auth login`), the network and HF_HUB_OFFLINE"
        ) from error
