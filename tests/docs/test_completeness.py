from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from milepost import config, errors, hookspecs
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/reference").glob("*.md")))
TEXTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "core/README.md", "*/*/README.md", "*/src/**/*.py", "*/*/src/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
HOOKS = [name for name in vars(hookspecs.Hooks) if not name.startswith("_")]
PROJECTS = [
    tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for pattern in ("pyproject.toml", "core/pyproject.toml", "*/*/pyproject.toml")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("setting", config.SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_in_the_reference(setting):
    assert f"`{setting.name}`" in REFERENCE


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_every_error_is_in_the_reference(name):
    assert f"`{name}`" in (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_error_is_drawn_in_the_tree(name):
    assert re.search(rf"\b{name}\b", errors.__doc__)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_the_reference_says_which_builtin_an_error_is(name):
    text = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    for base in getattr(errors, name).__bases__:
        if base.__module__ == "builtins" and base is not Exception:
            (said,) = [line for line in text.splitlines() if line.startswith((f"| `{name}` |", f"`{name}`"))]
            assert f"`{base.__name__}`" in said


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_in_the_reference_with_its_exact_signature(name):
    signature = inspect.signature(getattr(hookspecs.Hooks, name))
    parameters = [value for key, value in signature.parameters.items() if key != "self"]
    shown = str(signature.replace(parameters=parameters)).replace("'", "")
    assert f"### `{name}{shown}`\n" in (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")


def test_the_reference_has_no_hook_that_is_gone():
    text = (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")
    assert sorted(HOOKS) == sorted(re.findall(r"^### `(\w+)\(", text, re.MULTILINE))


def test_every_group_of_entry_points_is_in_the_reference():
    from milepost import plugins

    for group in plugins.GROUPS:
        assert f"`{group}`" in (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_documentation():
    from milepost import cli

    app = cli.app() if inspect.isfunction(cli.app) else cli.app
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names >= {"ls", "show", "verify", "explain", "plugins"}
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS)
    assert [name for name in sorted(names) if f"milepost {name}" not in text] == []


WORD = re.compile(
    r"""[ ](?P<quote>["']?)
    (?: --group[ ][\w-]+ | -{1,2}[\w-]+ | [./][\w./\[\],-]* | (?P<name>[A-Za-z][\w-]*(\[[\w,]+\])?) )
    (?P=quote)(?![\w={])""",
    re.VERBOSE,
)


def requirements_in(path):
    text = path.read_text(encoding="utf-8")
    for command in re.finditer(r"pip install(?= )", text):
        end = command.end()
        line_end = text.index("\n", end)
        while word := WORD.match(text, end, line_end):
            end = word.end()
            if word["name"]:
                yield Requirement(word["name"])


def test_every_hint_to_install_something_names_a_package_that_there_is():
    extras = {project["name"]: set(project.get("optional-dependencies", {})) for project in PROJECTS}
    tools = {"nox", "pip", "towncrier", "build"}  # for whoever works on milepost itself
    found = [(path, wanted) for path in TEXTS for wanted in requirements_in(path) if wanted.name not in tools]
    assert {wanted.name for _, wanted in found} >= {"milepost", "milepost-safetensors"}
    strange = [
        f"{path.relative_to(ROOT)}: {wanted}"
        for path, wanted in found
        if wanted.name not in extras or not wanted.extras <= extras[wanted.name]
    ]
    assert strange == []


def test_every_package_that_an_error_tells_to_install_is_one_of_this_repository():
    from milepost import plugins

    assert set(plugins.HINTS.values()) <= {project["name"] for project in PROJECTS}


def test_the_readme_names_every_package_of_this_repository():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [project["name"] for project in PROJECTS if f"| `{project['name']}` |" not in text] == []


# --- the backend of the guide ----------------------------------------------------------------------------------------

USE = """
import json, sys
import numpy as np
import milepost
from milepost.errors import AlreadyExistsError

url = f"sqlite://{sys.argv[1]}/example.db/runs/7"
milepost.save(url, {"weights": np.arange(6.0), "step": 7})
try:
    milepost.save(url, {"weights": np.zeros(6), "step": 8})
except AlreadyExistsError:
    refused = True
state = milepost.load(url)
print(json.dumps({"refused": refused, "step": state["step"], "weights": np.asarray(state["weights"]).tolist()}))
"""


def test_the_backend_of_the_guide_works_once_it_is_installed(tmp_path):
    guide = (ROOT / "docs/how-to/write-a-backend.md").read_text(encoding="utf-8")
    module, *_ = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    project, *_ = re.findall(r"^```toml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    described = tomllib.loads(project)["project"]
    (tmp_path / "milepost_sqlite.py").write_text(module, encoding="utf-8")
    about = tmp_path / f"milepost_sqlite-{described['version']}.dist-info"
    about.mkdir()
    lines = (f"Metadata-Version: 2.1\nName: {described['name']}\nVersion: {described['version']}\n",)
    (about / "METADATA").write_text("".join(lines), encoding="utf-8")
    ((group, (offered)),) = described["entry-points"].items()
    entries = "".join(f"{name} = {value}\n" for name, value in offered.items())
    (about / "entry_points.txt").write_text(f"[{group}]\n{entries}", encoding="utf-8")

    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"refused": True, "step": 7, "weights": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}


def test_the_version_of_every_package_is_the_same():
    assert {importlib.metadata.version(project["name"]) for project in PROJECTS} == {PROJECTS[0]["version"]}
