"""Train, evaluate and publish on a rented GPU (Hugging Face Jobs). The token pays for it."""

import argparse

from pipeline.errors import confirm, run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any key of a recipe can be given too, as --learning_rate=2e-4.",
        allow_abbrev=False,
    )
    parser.add_argument("repo", help="where the model is published, as name/model")
    parser.add_argument("--recipe", default="vit-base", help="its name, or a YAML file in git")
    parser.add_argument("--run", help="name of the run (default: the recipe's name)")
    parser.add_argument("--flavor", required=True, help="the machine, as a10g-small")
    parser.add_argument("--timeout", help="when the job is ended, as 2h")
    parser.add_argument("--license", help="of the model, where the backbone has none")
    parser.add_argument("--dry_run", action="store_true", help="print the job; start nothing")
    parser.add_argument("--detach", action="store_true", help="don't follow the log")
    parser.add_argument("--yes", action="store_true", help="don't ask before it costs money")
    args, overrides = parser.parse_known_args()

    # After the arguments: these take seconds to import.
    from pipeline.publish import job as jobs
    from pipeline.publish.connection import connect, hub_errors
    from pipeline.publish.provenance import find_code_url
    from pipeline.recipe import load_recipe

    api = connect()
    with hub_errors(api, args.repo):
        recipe = load_recipe(args.recipe, overrides, args.run)
        options = {"license": args.license, "code_url": find_code_url()}
        push_args = [f"--{key}={value}" for key, value in options.items() if value]
        job = jobs.plan(
            api, recipe, args.recipe, overrides, args.repo, args.flavor, args.timeout, push_args
        )
        print(
            f"Machine     {job.flavor}, ${job.price:.2f} an hour, at most "
            f"${job.price * job.hours:.2f} in {job.timeout}\n"
            f"Code        commit {job.commit[:12]}, to the private dataset {job.code_repo}\n"
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
    run_main(main, "Stopped following; the job goes on.")
