"""The documents: their links, commands and words."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import recipe_docs
from samples import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "space/README.md"])
# What ../shared/STYLE.md rejects, words of our own for what the field has a word for, and
# British spelling.
REJECTED = re.compile(
    r"\b(surest|familiarity|carv(e|ed|ing)|in one word|with a word|no whole model|what came of it"
    r"|out of one machine|licence[sd]?|colours?|behaviours?|favour\w*|normalise\w*"
    r"|recognise\w*|initialise\w*|optimise\w*|visualise\w*|centre[sd]?|greys?"
    r"|chances are|by the way|scarcely|whilst|hitherto)\b"
)
PROSE = (".md", ".py", ".yaml", ".toml", ".css", ".ipynb")


FOLDERS = (
    "benchmarks", "docs", "local_hub", "notebooks", "pipeline", "scripts", "space", "tests",
)  # fmt: skip


def prose_files() -> list[Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [path for path in [*ROOT.iterdir(), *files] if path.suffix in PROSE and path.is_file()]
    return [path for path in files if path != Path(__file__)]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_resolves(document):
    text = document.read_text("utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = document if not path else (document.parent / path)
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target.read_text("utf-8"))
        ):
            broken.append(link)
    assert broken == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_command_is_one(document):
    text = re.sub(r"\\\n\s*", "", document.read_text("utf-8"))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [re.sub(r"\s+#.*$", "", line) for line in blocks.splitlines()]
    commands = [line for line in lines if line.startswith("make ")]
    commands += [code.replace("\n", " ") for code in re.findall(r"`(make [^`]*)`", text)]
    for command in commands:
        dry = re.sub(r"\bmake\b(?= )", "make -n", command)
        done = subprocess.run(["bash", "-c", dry], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_no_file_has_a_word_that_the_style_rejects():
    found = {}
    for path in prose_files():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if match := REJECTED.search(line.lower()):
                found[f"{path.relative_to(ROOT)}:{number}"] = match[0]
    assert found == {}


def test_the_page_on_recipes_is_that_of_the_code():
    assert recipe_docs.FILE.read_text("utf-8") == recipe_docs.render(), (
        "run .venv/bin/python tests/support/recipe_docs.py"
    )
