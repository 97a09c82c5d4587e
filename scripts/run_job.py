"""Train, evaluate and publish on a rented GPU (Hugging Face Jobs), billed to the token's owner."""

import argparse

from pipeline.errors import confirm, run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any recipe key is also an option, such as --learning_rate=2e-4.",
        allow_abbrev=False,
    )
    parser.add_argument("repo", help="the repository to publish to, as name/model")
    parser.add_argument("--recipe", default="vit-base", help="a recipe name, or a YAML file in git")
    parser.add_argument("--run", help="name of the run (default: the recipe's name)")
    parser.add_argument("--flavor", required=True, help="the machine, such as a10g-small")
    parser.add_argument("--timeout", help="time limit of the job, such as 2h")
    parser.add_argument("--license", help="license of the model, if the backbone has none")
    parser.add_argument("--dry_run", action="store_true", help="print the job without starting it")
    parser.add_argument("--detach", action="store_true", help="don't follow the log")
    parser.add_argument("--yes", action="store_true", help="start without confirmation")
    args, overrides = parser.parse_known_args()

    # Imported after parsing, since these imports take seconds.
    from pipeline.publish import job as jobs
    from pipeline.publish.connection import connect, hub_errors
    from pipeline.publish.hub import Repository
    from pipeline.publish.provenance import find_code_url, find_license
    from pipeline.recipe import load_recipe

    api = connect()
    with hub_errors(api, args.repo):
        recipe = load_recipe(args.recipe, overrides, args.run)
        options = {"license": args.license, "code_url": find_code_url()}
        push_args = [f"--{key}={value}" for key, value in options.items() if value]
        job = jobs.plan(
            api, recipe, args.recipe, overrides, args.repo, args.flavor, args.timeout, push_args
        )
        # What `make push` would refuse in the end.
        backbone = {"model": recipe.model.model, "model_revision": recipe.model.model_revision}
        find_license(api, {"recipe": backbone}, args.license)
        Repository(api, args.repo).check_access()
        print(
            f"Machine     {job.flavor}, ${job.price:.2f} per hour, at most "
            f"${job.price * job.hours:.2f} in {job.timeout}\n"
            f"Code        commit {job.commit[:12]}, in the private dataset {job.code_repo}\n"
            f"Checkpoints private bucket {job.bucket}\n"
            f"Publishes   {args.repo}\n\n{job.command[-1]}"
        )
        if args.dry_run:
            return
        confirm(f"Start this job as {args.repo}?", args.yes)
        info = jobs.submit(api, job)
        print(f"Job {info.id}: {info.url}")
        if not args.detach:
            jobs.follow(api, info)


if __name__ == "__main__":
    run_main(main, "Stopped following the log; the job continues.")
