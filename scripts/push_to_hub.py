"""Publish a model with its card and results as one commit, verify the download, then tag it."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("repo", help="owner/name; with --verify_only also owner/name@revision")
    parser.add_argument("--model", help="its folder (default: the model trained last)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--pr", action="store_true", help="open a pull request")
    parser.add_argument("--tag", help="a tag, set once the download is verified")
    parser.add_argument("--dry_run", action="store_true", help="show what would be done")
    parser.add_argument("--full", action="store_true", help="verify on all test images, not 1,000")
    parser.add_argument("--seed", type=int, help="of the random test images (default: a new one)")
    parser.add_argument("--dataset", help="where the test images are, if not where they were")
    parser.add_argument("--verify_only", action="store_true", help="verify what is published")
    args = parser.parse_args()
    if args.pr and args.tag:
        raise UserError("A pull request can't be tagged: tag it when it is merged.")
    from pipeline import runs  # after the arguments: the imports take seconds
    from pipeline.publish.hub import Repository, connect
    from pipeline.publish.verify import SAMPLE_SIZE, verify

    if args.verify_only:
        repo, commit = runs.split_revision(args.repo)
        repository = Repository(connect(anonymous=True), repo)
    else:
        repository = Repository(connect(), args.repo)
        commit = push(repository, args)
        if commit is None:
            return

    # Only what passes the verification is tagged.
    images = None if args.full else SAMPLE_SIZE
    verified = verify(repository, commit, images, args.dataset, args.seed)
    print(
        f"Verified:   {repository.name} @ {verified.commit[:12]}. Checksums, card and metrics are "
        f"right,\n            and pipeline() gives the published predictions for "
        f"{verified.images:,} test images (seed {verified.seed})."
    )
    if args.tag:
        repository.tag(args.tag, commit)
        print(f"Tagged:     {args.tag}")


def push(repository, args: argparse.Namespace) -> str | None:
    """Push the model in one commit, and return it; None for a dry run."""
    from pipeline import runs
    from pipeline.publish.staging import stage_model

    # Is it allowed?
    parent_commit = repository.check_access(args.private, args.pr)
    model = Path(args.model or runs.last_run()).expanduser()
    url = f"{repository.api.endpoint}/{repository.name}"
    print(f"Model:      {model}")
    print(f"Repository: {url} ({'existing' if parent_commit else 'new'})")

    with tempfile.TemporaryDirectory() as folder:
        # What would change?
        staged = stage_model(repository.api, model, repository.name, Path(folder))
        plan = repository.plan(staged, parent_commit)
        if args.tag and parent_commit:
            repository.check_tag(args.tag, None if plan else parent_commit)
        print(plan.describe(staged))
        if args.dry_run:
            card = runs.results_folder(str(model)) / "model_card.md"
            card.write_bytes(staged["README.md"].read_bytes())
            return print(f"Nothing was sent. The card is in {card}.")
        if not plan:
            print("Nothing has changed since the last push: there is no new commit.")
            return parent_commit

        # One commit, or nothing.
        plan.parent_commit = parent_commit or repository.create(args.private)
        commit = repository.commit(staged, plan, f"Publish {model.name}", args.pr)
    print(f"Published:  {url}/commit/{commit}")
    if args.pr:
        ref = next(ref for ref, sha in repository.refs().items() if sha == commit)
        print(f"Proposed:   {url}/discussions/{ref.removeprefix('refs/pr/')}")
    return commit


if __name__ == "__main__":
    run_main(main, "Stopped. The repository is as it was, or has the whole new commit.")
