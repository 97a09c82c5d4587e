"""Publish a model with its card and results as one commit, verify the download, then tag it."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, confirm, run_main

LARGE = 50e6  # bytes, from which progress bars are worth their lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("repo", nargs="?", help="owner/name (default: you/backbone-finetuned-dataset)")
    option("--model", help="its folder (default: the model trained last)")
    option("--private", action="store_true", help="make a new repository private")
    option("--pr", action="store_true", help="open a pull request")
    option("--tag", help="a tag, set once the download is verified")
    option("--license", help="of the weights (default: the backbone's)")
    option("--code_url", help="where the code is (default: git's remote)")
    option("--publish_images", action="store_true", help="publish images that are not public too")
    option("--replace", action="store_true", help="overwrite what this pipeline did not write")
    option("--yes", action="store_true", help="don't ask whether the default name is right")
    option("--dry_run", action="store_true", help="show what would be done")
    option("--full", action="store_true", help="verify on all test images, not 1,000")
    option("--seed", type=int, help="of the random test images (default: a new one)")
    option("--dataset", help="where the test images are, if not where they were")
    option("--verify_only", action="store_true", help="verify repo, or repo@revision")
    args = parser.parse_args()
    if args.pr and args.tag:
        raise UserError("A pull request can't be tagged: tag it when it is merged.")
    from datasets import disable_progress_bars  # after the arguments: the imports take seconds
    from transformers.utils.logging import disable_progress_bar

    from pipeline import runs
    from pipeline.publish.connection import connect
    from pipeline.publish.hub import Repository
    from pipeline.publish.verify import SAMPLE_SIZE, verify

    disable_progress_bars()
    disable_progress_bar()
    if args.verify_only:
        if not args.repo:
            raise UserError("Say what to verify, as REPO=you/model or REPO=you/model@v1.")
        name, commit = runs.split_revision(args.repo)
        repository, back = Repository(connect(anonymous=True), name), ""
    else:
        repository, commit, back = push(connect(), args)
        if commit is None:
            return

    # Only what passes the verification is tagged.
    try:
        images = None if args.full else SAMPLE_SIZE
        verified = verify(repository, commit, images, args.dataset, args.seed)
    except UserError as error:
        raise UserError(f"{error}{back}") from None
    print(f"Verified:   {repository.name} @ {verified.commit[:12]}")
    width = max(map(len, verified.checks))
    print("\n".join(f"  {check:{width}}  {state}" for check, state in verified.checks.items()))
    if args.tag and not args.verify_only:
        repository.tag(args.tag, commit)
        print(f"Tagged:     {args.tag}")


def push(api, args: argparse.Namespace):
    """Push the model in one commit.

    Returns:
        The repository, the commit (None for a dry run), and how to go back from it.
    """
    from huggingface_hub.utils import disable_progress_bars

    from pipeline import runs
    from pipeline.publish import provenance, staging
    from pipeline.publish.hub import Repository

    # Is it allowed?
    model = Path(args.model or runs.last_run()).expanduser()
    name = args.repo or provenance.default_name(api, model)
    repository = Repository(api, name)
    account, parent_commit, is_private = repository.check_access(args.private, args.pr)
    url, state = f"{api.endpoint}/{name}", "existing" if parent_commit else "new"
    print(f"Model:      {model}\nAccount:    {account} at {api.endpoint}")
    print(f"Repository: {url} ({state}, {'private' if is_private else 'public'})")
    with tempfile.TemporaryDirectory() as folder:
        # What would change?
        staged = staging.stage_model(
            api, model, name, Path(folder),
            args.publish_images, args.license, args.code_url, args.dataset,
        )  # fmt: skip
        plan = repository.plan(staged, parent_commit, args.replace)
        args.dataset = args.dataset or provenance.local_dataset(model)
        if args.tag:
            repository.check_tag(args.tag, None if plan else parent_commit, not parent_commit)
        print(plan.describe(staged))
        if args.dry_run:
            card = runs.results_folder(str(model)) / "model_card.md"
            card.write_bytes(staged["README.md"].read_bytes())
            print(f"Nothing was sent. The card is in {card}.")
            return repository, None, ""
        if not plan:
            print("Nothing has changed since the last push: there is no new commit.")
            return repository, parent_commit, ""
        if not args.repo:
            confirm(f"Publish as {name}?", args.yes)

        # One commit, or nothing.
        if sum(file.stat().st_size for file in staged.values()) < LARGE:
            disable_progress_bars()
        plan.parent_commit = parent_commit or repository.create(args.private)
        commit = repository.commit(staged, plan, "Publish the model, its results and card", args.pr)
    print(f"Published:  {url}/commit/{commit}")
    if args.pr:
        ref = next(ref for ref, sha in repository.refs().items() if sha == commit)
        print(f"Proposed:   {url}/discussions/{ref.removeprefix('refs/pr/')}")
        return repository, commit, "\nmain is as it was: close the pull request."
    provenance.record_push(model, api.endpoint, name, commit)
    back = f"It was empty before: `hf repos delete {name}` removes it."
    if parent_commit:
        back = (
            f"To go back to {parent_commit[:12]}:\n"
            f"  hf download {name} --revision {parent_commit} --local-dir before\n"
            f'  hf upload {name} before . --delete "*"'
        )
    return repository, commit, f"\nmain holds {commit[:12]}, not verified and not tagged. {back}"


if __name__ == "__main__":
    run_main(main, "Stopped. The repository is as it was, or has the whole new commit.")
