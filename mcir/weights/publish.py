"""Trained weights to a model repository of the Hugging Face Hub: the folder that `hub-folder` writes, in one commit.

The token is the environment's (HF_TOKEN) or that of `hf auth login`."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from mcir.data.push import refusals
from mcir.errors import UserError
from mcir.weights.export import check_output, export
from mcir.weights.trained import Trained


def publish(
    trained: Trained,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    output: Path | None = None,
    pictures: Mapping[str, bytes] | None = None,
    licence: str | None = None,
) -> str:
    """Upload weights, config and card to `owner/name`, made where there is none; the address of the commit.

    `revision`: a branch, made where there is none; `output`: where the folder is kept beside. See `export` for the
    rest. UserError: no token, no such owner, no network.
    """
    from huggingface_hub import HfApi

    if output:
        check_output(trained, output, is_folder=True)
    with refusals(f"--repo {repo}"):
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
    with TemporaryDirectory() as temporary:
        folder = export(trained, "hub-folder", output or Path(temporary) / "hub", None, pictures, licence, repo)
        with refusals(f"--repo {repo}"):
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=f"{trained.name}, exported by mcir"
            )
    if not commit.commit_url:
        raise UserError(f"--repo {repo}: the Hub made no commit")
    return str(commit.commit_url)
