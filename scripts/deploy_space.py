"""Publish the Space as one commit, showing one commit of a model, and wait until it runs."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, confirm, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("repo", nargs="?", help="the Space, as owner/name (default: the model's name)")
    option("--model", help="owner/name or owner/name@revision (default: the one pushed last)")
    option("--private", action="store_true", help="make a new Space private")
    option("--replace", action="store_true", help="overwrite what this pipeline did not write")
    option("--yes", action="store_true", help="don't ask whether the default name is right")
    option("--dry_run", action="store_true", help="show what would be done")
    args = parser.parse_args()
    from pipeline import runs  # takes seconds
    from pipeline.publish import connection, hub, provenance, space, staging

    api = connection.connect()
    pushed = provenance.last_push(api.endpoint)
    if not (args.model or pushed):
        raise UserError("No model was pushed from here: name one with MODEL=.")
    model = space.find_model(api, args.model or pushed[1]["repo"])
    repository = hub.Repository(api, args.repo or model.id, "space")
    account, parent_commit, is_private = repository.check_access(args.private)
    page = f"{api.endpoint}/spaces/{repository.name}"
    with tempfile.TemporaryDirectory() as folder:
        files = space.published_files(model)
        staged = staging.stage(files, Path(folder), api.token)
        staged = staging.add_list(staged, Path(folder))
        plan = repository.plan(staged, parent_commit, args.replace)
        state = "existing" if parent_commit else "new"
        print(f"Account:   {account} at {api.endpoint}")
        print(f"Space:     {page} ({state}, {'private' if is_private else 'public'})")
        print(f"Model:     {model.id} @ {model.sha[:12]}\n{plan.describe(staged)}")
        if args.dry_run:
            return print("Nothing was sent.")
        if not args.repo:
            confirm(f"Publish as {repository.name}?", args.yes)
        plan.parent_commit = parent_commit or repository.create(args.private, "gradio")
        # The variables come first: the commit then starts the build with them.
        has_new_model, commit = space.set_model(repository, model), plan.parent_commit
        if plan:
            commit = repository.commit(staged, plan, f"Show {model.id} @ {model.sha[:12]}")
            print(f"Published: {page}/commit/{commit}")
        else:
            print(f"No file has changed.{' The model has.' if has_new_model else ''}")
    if not is_private and (pushed := provenance.last_push(api.endpoint, model.id)):
        file, record = pushed
        runs.write_json(file, record | {"space": repository.name})  # the next card links it
    if model.private:
        print(f"{model.id} is private: give the Space a secret HF_TOKEN that can read it.")
    print("Waiting for the build.", flush=True)
    stage = space.wait_until_settled(repository, commit)
    if stage not in ("RUNNING", "STOPPED", "PAUSED"):
        raise UserError(f"{page} is in the stage {stage}.\n{space.log_tail(repository, stage)}")
    print(f"Stage:     {page} is {stage.lower()}.")


if __name__ == "__main__":
    run_main(main, "Stopped. The Space is as it was, or has the whole new commit.")
