from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: (?P<reason>[^>]+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]+)(#[^)]*)?\)")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] == language:
            yield text[: found.start("code")].count("\n"), found["code"], found["reason"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    namespace = {"__name__": "__page__"}
    for line, code, reason in blocks(page, "python"):
        if reason is None:
            # Blank lines in front: a traceback then names the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # noqa: S102 - the page is ours


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_toml_block_is_toml(page):
    for _, text, _ in blocks(page, "toml"):
        tomllib.loads(text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_link_leads_to_a_file(page):
    targets = {found["target"] for found in LINK.finditer(page.read_text(encoding="utf-8"))}
    assert [target for target in sorted(targets) if not (page.parent / target).exists()] == []


def test_the_pages_have_blocks_that_run():
    counted = {
        name_of(page): len([code for _, code, reason in blocks(page, "python") if reason is None]) for page in PAGES
    }
    assert counted["README.md"] == (ROOT / "README.md").read_text(encoding="utf-8").count("```python")
    assert counted["docs/tutorials/first-checkpoint.md"] > 0


def test_use_comes_before_anything_else_in_the_readme():
    (_, first, _), *_ = blocks(ROOT / "README.md", "python")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# milepost\n\n```python\n")
    assert len([line for line in first.splitlines() if line]) <= 5
