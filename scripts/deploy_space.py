"""Publish the Space as one commit, showing one commit of a model, and wait until it runs."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("repo", help="the Space, as owner/name")
    parser.add_argument("--model", required=True, help="owner/name or owner/name@revision")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--dry_run", action="store_true", help="show what would be done")
    args = parser.parse_args()
    from pipeline.publish import hub, space, staging  # takes seconds

    repository = hub.Repository(hub.connect(), args.repo, "space")
    parent_commit = repository.check_access(args.private)
    model = space.find_model(repository.api, args.model)
    page = f"{repository.api.endpoint}/spaces/{args.repo}"
    with tempfile.TemporaryDirectory() as folder:
        files = space.published_files(model)
        staged = staging.stage(files, Path(folder), repository.api.token)
        plan = repository.plan(staged, parent_commit)
        print(f"{page} ({'existing' if parent_commit else 'new'})\n{plan.describe(staged)}")
        print(f"Model:     {model.id} @ {model.sha[:12]}")
        if args.dry_run:
            return print("Nothing was sent.")
        plan.parent_commit = parent_commit or repository.create(args.private, "gradio")
        # The variables come first: the commit then starts the build with them.
        has_new_model, commit = space.set_model(repository, model), plan.parent_commit
        if plan:
            commit = repository.commit(staged, plan, f"Show {model.id} @ {model.sha[:12]}")
            print(f"Published: {page}/commit/{commit}")
        else:
            print(f"No file has changed.{' The model has.' if has_new_model else ''}")
    if model.private:
        print(f"{model.id} is private: give the Space a secret HF_TOKEN that can read it.")
    print("Waiting for the build.", flush=True)
    stage = space.wait_until_settled(repository, commit)
    if stage not in ("RUNNING", "STOPPED", "PAUSED"):
        raise UserError(f"{page} is in the stage {stage}.\n{space.log_tail(repository, stage)}")
    print(f"Stage:     {page} is {stage.lower()}.")


if __name__ == "__main__":
    run_main(main, "Stopped. The Space is as it was, or has the whole new commit.")
