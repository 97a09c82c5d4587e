"""Publish the Space, which shows one commit of a model, as one commit; wait until it runs."""

import argparse
import tempfile
from pathlib import Path

from pipeline.errors import UserError, confirm, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("repo", nargs="?", help="the Space, as owner/name (default: the model's name)")
    option("--model", help="owner/name or owner/name@revision (default: the last one pushed)")
    option("--private", action="store_true", help="make a new Space private")
    option("--replace", action="store_true", help="overwrite files not written by this pipeline")
    option("--yes", action="store_true", help="use the default name without confirmation")
    option("--dry_run", action="store_true", help="show what would be done")
    args = parser.parse_args()
    from pipeline import runs  # this import takes seconds
    from pipeline.publish import connection, hub, provenance, space, staging

    api = connection.connect()
    pushed = provenance.last_push(api.endpoint)
    if not (args.model or pushed):
        raise UserError("No model was pushed from this folder: name one with MODEL=.")
    name, revision = runs.split_revision(args.model or pushed[1]["repo"])
    model = hub.Repository(api, name).request(api.repo_info, revision=revision)
    repository = hub.Repository(api, args.repo or model.id, "space")
    account, parent_commit, is_private = repository.check_access(args.private)
    page = f"{api.endpoint}/spaces/{repository.name}"
    with tempfile.TemporaryDirectory() as folder:
        staged = staging.stage(space.published_files(model, page), Path(folder), api.token)
        staged = staging.add_list(staged)
        plan = repository.plan(staged, parent_commit, args.replace)
        state = "existing" if parent_commit else "new"
        print(f"Account:   {account} at {api.endpoint}")
        print(f"Space:     {page} ({state}, {'private' if is_private else 'public'})")
        print(f"Model:     {model.id} @ {model.sha[:12]}\n{plan.describe(staged)}")
        if args.dry_run:
            return print("Nothing was sent.")
        if not args.repo:
            confirm(f"Publish as {repository.name}?", args.yes)
        print("Testing the Space on this machine first.", flush=True)
        space.try_here(Path(folder), api)
        commit = plan.parent_commit = parent_commit or repository.create(args.private, "gradio")
        if plan:
            commit = repository.commit(staged, plan, f"Show {model.id} @ {model.sha[:12]}")
    print(f"Published: {page}/commit/{commit}" if plan else "No file has changed.")
    if not is_private and (pushed := provenance.last_push(api.endpoint, model.id)):
        runs.write_json(pushed[0], pushed[1] | {"space": repository.name})  # for the next card
    if model.private:
        print(f"{model.id} is private: give the Space a secret HF_TOKEN with read access to it.")
    print("Waiting for the build.", flush=True)
    stage = space.wait_until_settled(repository, commit)
    print(f"Stage:     {page} is {stage.lower()}.")
    if stage in ("RUNNING", "SLEEPING"):
        print(f"Answer:    {space.EXAMPLE.name} is {space.classify_example(repository)}")


if __name__ == "__main__":
    run_main(main, "Stopped. The Space is unchanged, or has the complete new commit.")
