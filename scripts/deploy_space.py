"""Publish the Space as one commit, showing one commit of a model, and wait until it runs."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("repo", help="the Space, as name/space")
    parser.add_argument("--model_repo", help="name/model, or name/model@rev")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--dry_run", action="store_true", help="show what would be done")
    deploy(parser.parse_args())


def deploy(arguments: argparse.Namespace) -> None:
    if not arguments.model_repo:
        raise UserError("Say which model the Space shows, with MODEL_REPO=name/model.")
    # After the arguments: the libraries take seconds.
    from pipeline import hub, space

    # May it be written, and is there a model to show?
    repo = arguments.repo
    api = hub.connect()
    info = hub.check_access(api, repo, arguments.private, repo_type="space")
    model = space.find_model(api, arguments.model_repo)

    with tempfile.TemporaryDirectory() as folder:
        # What would change there?
        staged = hub.stage(space.files(), space.readme(model), Path(folder), api.token)
        plan = hub.plan(api, repo, staged, info.sha if info else None, "space")
        print(hub.manifest(plan, staged))
        print(f"Shows:     {model.name} @ {model.commit[:12]}")
        if arguments.dry_run:
            print("Nothing was sent.")
            return

        # The model first: the commit then starts the build with it.
        plan.head = plan.head or hub.create(api, repo, arguments.private, "space", "gradio")
        changed = space.set_variables(api, repo, model.variables)
        if plan:
            message = f"Show {model.name} @ {model.commit[:12]}"
            commit = hub.commit(api, repo, staged, plan, message, repo_type="space")
            if hub.plan(api, repo, staged, commit, "space"):
                raise UserError(f"{repo} @ {commit[:12]} is not what was sent.")
            print(f"Published: {api.endpoint}/spaces/{repo}/commit/{commit}")
        else:
            commit = plan.head
            print(
                "No file has changed since the last time; the model has."
                if changed
                else "Nothing has changed since the last time: no commit."
            )
    if model.private:
        print(f"{model.name} is private: give the Space a secret HF_TOKEN that may read it.")
    report(api, repo, commit)


def report(api, repo: str, commit: str) -> None:
    """Wait for the build; where it fails, UserError with the end of its log."""
    from pipeline import space

    page = f"{api.endpoint}/spaces/{repo}"
    print("Waiting for the build", flush=True)
    stage = space.wait(api, repo, commit)
    if stage == "RUNNING":
        print(f"Running:   {page}")
    elif stage in ("STOPPED", "PAUSED"):
        print(f"Kept:      {page} is {stage.lower()}: this Hub does not run it now.")
    else:
        raise UserError(f"{page} ended in the stage {stage}.\n{space.log(api, repo, stage)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The Space is as it was, or holds the whole new commit.")
