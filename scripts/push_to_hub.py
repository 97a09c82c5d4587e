"""Publish a model with its card and results as one commit, verify the download, then tag it."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, confirm, run_main

LARGE = 50e6  # bytes; larger uploads show progress bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("repo", nargs="?", help="owner/name (default: you/backbone-finetuned-dataset)")
    option("--model", help="the model's folder (default: the last run)")
    option("--private", action="store_true", help="make a new repository private")
    option("--pr", action="store_true", help="open a pull request")
    option("--tag", help="tag the commit once its download is verified")
    option("--license", help="license of the weights (default: the backbone's)")
    option("--code_url", help="URL of the code (default: git's remote)")
    option("--publish_images", action="store_true", help="also publish images that are not public")
    option("--replace", action="store_true", help="overwrite files not written by this pipeline")
    option("--yes", action="store_true", help="use the default name without confirmation")
    option("--dry_run", action="store_true", help="show what would be done")
    option("--full", action="store_true", help="verify on all test images, not only 1,000")
    option("--seed", type=int, help="seed for the random test images (default: a new one)")
    option("--dataset", help="new location of the test images, if they were moved")
    option("--verify_only", action="store_true", help="only verify repo or repo@revision")
    args = parser.parse_args()
    if args.pr and args.tag:
        raise UserError("A pull request can't be tagged: tag the commit after it is merged.")
    if args.verify_only and not args.repo:
        raise UserError("Name what to verify, such as REPO=you/model or REPO=you/model@v1.")
    from datasets import disable_progress_bars  # after parsing, since imports take seconds
    from transformers.utils.logging import disable_progress_bar

    from pipeline.publish.connection import connect
    from pipeline.publish.hub import Repository
    from pipeline.publish.verify import SAMPLE_SIZE, verify
    from pipeline.runs import split_revision

    disable_progress_bars()
    disable_progress_bar()
    if args.verify_only:
        name, commit = split_revision(args.repo)
        repository, back = Repository(connect(anonymous=True), name), ""
    else:
        repository, commit, back = push(connect(), args)
        if args.dry_run:
            return

    # Tag only a commit that passes verification.
    try:
        images = None if args.full else SAMPLE_SIZE
        commit, checks = verify(repository, commit, images, args.dataset, args.seed)
    except UserError as error:
        raise UserError(f"{error}{back}") from None
    print(f"Verified:   {repository.name} @ {commit[:12]}")
    width = max(map(len, checks))
    print("\n".join(f"  {check:{width}}  {state}" for check, state in checks.items()))
    if args.tag and not args.verify_only:
        repository.tag(args.tag, commit)
        print(f"Tagged:     {args.tag}")


def push(api, args: argparse.Namespace):
    """Push the model in one commit; return the repository, the commit, and rollback advice."""
    from huggingface_hub.utils import disable_progress_bars

    from pipeline import runs
    from pipeline.publish import hub, provenance, staging

    # Check access.
    model = Path(args.model or runs.last_run()).expanduser()
    repository = hub.Repository(api, args.repo or provenance.default_name(api, model))
    account, parent_commit, is_private = repository.check_access(args.private, args.pr)
    name, url = repository.name, f"{api.endpoint}/{repository.name}"
    state = f"{'existing' if parent_commit else 'new'}, {'private' if is_private else 'public'}"
    print(f"Model:      {model}\nAccount:    {account} at {api.endpoint}")
    print(f"Repository: {url} ({state})")
    with tempfile.TemporaryDirectory() as temporary:
        # Show the changes.
        options = (args.publish_images, args.license, args.code_url, args.dataset)
        folder = staging.stage_model(api, model, name, Path(temporary), *options)
        plan = repository.plan(folder, parent_commit, args.replace)
        if args.tag:
            repository.check_tag(args.tag, None if plan else parent_commit, not parent_commit)
        print(plan.describe(folder))
        if args.dry_run:
            card = runs.results_folder(str(model)) / "model_card.md"
            card.write_bytes((folder / "README.md").read_bytes())
            print(f"Nothing was sent. The card is in {card}.")
            return repository, None, ""
        evaluated = provenance.read_results(model)["dataset"]
        args.dataset = args.dataset or (evaluated["name"] if evaluated["local"] else None)
        if not plan:
            print("Nothing has changed since the last push: there is no new commit.")
            return repository, parent_commit, ""
        if not args.repo:
            confirm(f"Publish as {name}?", args.yes)

        # Make one atomic commit.
        if sum((folder / path).stat().st_size for path in hub.list_files(folder)) < LARGE:
            disable_progress_bars()
        plan.parent_commit = parent_commit or repository.create(args.private)
        commit = repository.commit(folder, plan, "Publish the model, its results and card", args.pr)
    print(f"Published:  {url}/commit/{commit}")
    if args.pr:
        ref = next(ref for ref, sha in repository.refs().items() if sha == commit)
        print(f"Proposed:   {url}/discussions/{ref.removeprefix('refs/pr/')}")
        return repository, commit, "\nmain is unchanged: close the pull request."
    provenance.record_push(model, api.endpoint, name, commit)
    back = f"It was empty before: `hf repos delete {name}` deletes it."
    if parent_commit:
        back = (
            f"To go back to {parent_commit[:12]}:\n"
            f"  hf download {name} --revision {parent_commit} --local-dir before\n"
            f'  hf upload {name} before . --delete "*"'
        )
    return repository, commit, f"\nmain is now {commit[:12]}, not verified and not tagged. {back}"


if __name__ == "__main__":
    run_main(main, "Stopped. The repository is unchanged, or has the complete new commit.")
