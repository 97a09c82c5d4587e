"""Publish a model with its card and results as one commit, verify the download, then tag it."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("repo", help="name/model; with --verify_only also name/model@rev")
    parser.add_argument("--model", help="its folder (default: the last run)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="what it scored")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--tag", help="to be set once the download is verified")
    parser.add_argument("--dry_run", action="store_true", help="show what would be done")
    parser.add_argument("--full", action="store_true", help="verify on all test images, not 1,000")
    parser.add_argument("--dataset", help="where the test images are, if not where they were")
    parser.add_argument("--verify_only", action="store_true", help="verify what is published")
    arguments = parser.parse_args()
    if arguments.verify_only:
        name, _, revision = arguments.repo.partition("@")
        verify(name, revision or None, arguments)
    else:
        push(arguments)


def push(arguments: argparse.Namespace) -> None:
    repo, propose = arguments.repo, arguments.pr
    if propose and arguments.tag:
        raise UserError("A pull request can't be tagged: tag it when it is merged.")
    # After the arguments: the libraries take seconds.
    from pipeline import card, evaluation, hub

    # May it be written, and is it measured? Before anything is prepared.
    api = hub.connect()
    info = hub.check_access(api, repo, arguments.private, propose)
    model = Path(arguments.model or evaluation.last_run()).expanduser()
    results = read_results(arguments.results, model)
    faithfulness = read_faithfulness(arguments.results, results)

    with tempfile.TemporaryDirectory() as folder:
        # The card, from the results; and all files as they are now.
        base = card.hub_id((results.get("recipe") or {}).get("model"))
        licence = hub.licence(api, base) if base else own_licence(results)
        files = hub.published_files(model, arguments.results, maps=faithfulness is not None)
        text = card.render(results, repo, licence, list(files), faithfulness)
        staged = hub.stage(files, text, Path(folder), api.token)
        check_same(results, Path(folder), model)  # the copies: a training may be running

        # What would change there?
        plan = hub.plan(api, repo, staged, info.sha if info else None)
        existing = hub.tags(api, repo) if info else {}
        if arguments.tag in existing and (plan or existing[arguments.tag] != plan.head):
            raise UserError(f'"{repo}" has a tag {arguments.tag} already: choose another.')
        print(hub.manifest(plan, staged))
        if arguments.dry_run:
            written = arguments.results / "model_card.md"
            written.write_text(text)
            print(f"Nothing was sent. The card, to read: {written}")
            return

        # One commit, with all of it or nothing.
        if plan:
            plan.head = plan.head or hub.create(api, repo, arguments.private)
            commit = hub.commit(api, repo, staged, plan, message(results), propose)
            if hub.plan(api, repo, staged, commit):
                raise UserError(f"{repo} @ {commit[:12]} is not what was sent. It is not tagged.")
            print(
                f"{'Proposed' if propose else 'Published'}: {api.endpoint}/{repo}/commit/{commit}"
            )
        else:
            commit = plan.head
            print("Nothing has changed since the last push: no commit.")

    # Does the download keep what the card says? Only then the tag.
    verify(repo, commit, arguments)
    if arguments.tag:
        hub.tag(api, repo, arguments.tag, commit)
        print(f"Tagged:    {arguments.tag}")


def verify(repo: str, revision: str | None, arguments: argparse.Namespace) -> None:
    from pipeline import hub, verification

    images = None if arguments.full else verification.IMAGES
    done = verification.verify(hub.connect(), repo, revision, images, arguments.dataset)
    print(
        f"Verified:  {repo} @ {done.commit[:12]}: {done.files} files are whole, the card says what "
        f"was measured,\n           and pipeline() gets {done.right:,} of {done.images:,} test "
        "images right, as at evaluation."
    )


def read_results(folder: Path, model: Path) -> dict:
    """The results of evaluation; UserError unless they are of this very model."""
    file = folder / "evaluation_results.json"
    if not file.is_file():
        raise UserError(f"There are no results in {folder}: run `make evaluate MODEL={model}`.")
    results = json.loads(file.read_text())
    check_same(results, model, model)
    # What was measured before it could be rounded says nothing of it.
    if results.get("dtype") == "bfloat16":
        raise UserError(
            f"The results in {folder} are a first look, in bfloat16: run "
            f"`make evaluate MODEL={model}` before you publish."
        )
    return results


def check_same(results: dict, folder: Path, model: Path) -> None:
    from pipeline import hub

    changed = hub.changed_files(results["model"]["sha256"], folder)
    if changed:
        raise UserError(
            f"The results are not of this model: {' and '.join(changed)} in {model} is not what "
            f"was evaluated. Run `make evaluate MODEL={model}`."
        )


def read_faithfulness(folder: Path, results: dict) -> dict | None:
    """How faithful this model's maps are; None if unknown, or if they are another model's."""
    file = folder / "attention_faithfulness.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["sha256"] == results["model"]["sha256"]:
        return found
    print(f"The maps in {folder} are another model's: left out. `make visualize` draws this one's.")
    return None


def own_licence(results: dict) -> str | None:
    """A model trained from scratch is under this project's licence; one from a folder, unknown."""
    return None if (results.get("recipe") or {}).get("model") else "apache-2.0"


def message(results: dict) -> str:
    dataset = results["dataset"]
    return f"Publish the model: {results['accuracy']:.2%} on {dataset['split']}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The repository is as it was, or holds the whole new commit.")
