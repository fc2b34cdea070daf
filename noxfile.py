"""One session per check; `nox -l` lists them.

Decides what is installed for a check and how it is called. The rule: no logic here, so that every line of it can be
typed by hand. Sessions run on the interpreter that runs nox; `matrix` runs on every Python that milepost supports, and
an interpreter that is missing fails.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "imports", "tests", "torch", "digits", "docs"]

FOLDERS = (
    "./core",
    *("./backends/gcs", "./backends/posix", "./backends/s3"),
    *("./plugins/safetensors", "./plugins/tensorstore", "./plugins/zarr"),
    ".[all]",
)
PACKAGES = tuple(word for folder in FOLDERS for word in ("-e", folder))
MODULES = (
    "milepost",
    *("milepost_gcs", "milepost_posix", "milepost_s3"),
    *("milepost_safetensors", "milepost_tensorstore", "milepost_zarr"),
)
GROUPS = {
    name: nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name)
    for name in ("benchmark", "docs", "example", "lint", "test", "torch", "types")
}
ANYWHERE = "not gcc and not torch and not wire"
"""The tests whose outcome may depend on the versions of Python and of libraries."""


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*GROUPS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with two checkers, and that the public names are typed completely."""
    session.install(*PACKAGES, *GROUPS["types"])
    session.run("mypy")
    session.run("pyright")
    for module in MODULES:
        session.run("pyright", "--verifytypes", module, "--ignoreexternal")


@nox.session
def imports(session: nox.Session) -> None:
    """Check that dependencies point one way."""
    session.install(*PACKAGES, *GROUPS["lint"])
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, doctests among them; arguments after `--` go to pytest."""
    session.install(*PACKAGES, *GROUPS["test"])
    session.run("pytest", "--numprocesses=auto", "--maxprocesses=8", *session.posargs)


@nox.session
@nox.parametrize("backend", ["gcs", "posix", "s3"])
def backend(session: nox.Session, backend: str) -> None:
    """Run the tests of one backend alone."""
    session.install(*PACKAGES, *GROUPS["test"])
    session.run("pytest", f"tests/{backend}", *session.posargs)


@nox.session
@nox.parametrize("writer", ["safetensors", "tensorstore", "zarr"])
@nox.parametrize("backend", ["file", "gcs", "s3"])
def system(session: nox.Session, backend: str, writer: str) -> None:
    """Run what must hold everywhere on one backend, with one array writer."""
    session.install(*PACKAGES, *GROUPS["test"])
    session.run("pytest", "tests/system", "-k", f"{backend} and {writer}", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    """Run the tests that need PyTorch, some gigabytes of it."""
    session.install(*PACKAGES, *GROUPS["torch"])
    session.run("pytest", "-m", "torch", "tests/safetensors/test_torch.py", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def matrix(session: nox.Session) -> None:
    """Run the tests on every Python that milepost supports; what a crash leaves behind does not depend on it."""
    session.install(*PACKAGES, *GROUPS["test"])
    session.run("pytest", "--numprocesses=auto", "--maxprocesses=8", "-m", ANYWHERE, *session.posargs)


@nox.session(python="3.11", venv_backend="uv")
def minimums(session: nox.Session) -> None:
    """Run the tests with the oldest of everything that the packages say they work with; no crashes here either."""
    session.install("--resolution=lowest-direct", "-e", "./core[cli,jax]", *PACKAGES, *GROUPS["test"])
    session.run("pytest", "--numprocesses=auto", "--maxprocesses=8", "-m", ANYWHERE, *session.posargs)


@nox.session
def digits(session: nox.Session) -> None:
    """Train on handwritten digits, get killed, resume, and compare with a run that was left alone."""
    session.install(*PACKAGES, *GROUPS["example"])
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure milepost beside its peers and the disk, in one run."""
    session.install(*PACKAGES, *GROUPS["benchmark"])
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link fails."""
    session.install(*GROUPS["docs"])
    session.run("mkdocs", "build", "--strict", *session.posargs)
