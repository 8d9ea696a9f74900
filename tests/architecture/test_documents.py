"""Links of the documents lead somewhere, files that they name exist, and lines are for reading."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from trainer.__main__ import VERBS, parse, verb_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for place in ("*.md", "docs/*.md", "slurm/*.md", "k8s/*.md", "benchmarks/*.md")
    for path in ROOT.glob(place)
)
TREES = "trainer|data_pipeline|docs|tests|configs|benchmarks|experiments|slurm|k8s"
LONGEST = 120


def anchors(document: Path) -> set[str]:
    """The ids that a Markdown renderer gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown_commands(document: Path) -> list[str]:
    """What follows `ldm` in the blocks of code; continued lines are joined, comments are gone."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(rf"(?:\bldm|-m trainer) ((?:{'|'.join(VERBS)}) .+)$", line) for line in lines]
    return [re.sub(r"\s#.*|\s\[.*|\.\.\.", "", match[1]) for match in found if match]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    for path in re.findall(rf"`((?:{TREES})/[\w./-]+)(?:::?\w+)?`", text):
        if not (ROOT / path).exists():
            missing.append(path)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_but_those_of_tables_are_short(document: Path) -> None:
    lines = document.read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > LONGEST and not line.startswith("|")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted_by_their_parsers(document: Path) -> None:
    for command in shown_commands(document):
        if "|" in command:  # a choice is shown, nothing to type
            continue
        verb, *words = shlex.split(command)
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            try:
                parse(verb_parser(verb), words)
            except SystemExit:
                pytest.fail(f"ldm {command}: {told.getvalue()}")
