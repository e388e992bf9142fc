"""Imports point one way; the modules are parsed, not imported."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lightning_distill"
BELOW_COMMANDS = {
    "acting",
    "algorithms",
    "callbacks",
    "checks",
    "collector",
    "control",
    "data",
    "described",
    "envs",
    "evaluation",
    "intervals",
    "losses",
    "networks",
    "policies",
    "progress",
    "readers",
    "report",
    "rewards",
    "teachers",
}
MAY_IMPORT = {
    "checks": set(),
    "envs": set(),
    "networks": set(),
    "intervals": set(),
    "losses": {"checks"},
    "progress": set(),
    "report": {"intervals"},
    "acting": {"networks"},
    "described": {"envs"},
    "policies": {"acting", "described", "envs", "networks"},
    "readers": {"acting", "described", "envs", "networks", "policies"},
    "teachers": {"acting", "envs", "policies", "readers"},
    "collector": {"acting", "envs"},
    "control": {"acting", "checks", "policies", "teachers"},
    "rewards": {"losses"},
    "data": {
        *("checks", "collector", "control", "described", "envs", "policies", "progress"),
        "teachers",
    },
    "algorithms": {
        *("acting", "checks", "control", "described", "envs", "losses", "networks"),
        *("policies", "readers", "rewards"),
    },
    "evaluation": {"acting", "envs", "intervals", "progress"},
    # Of data and algorithms only the base classes: what any module of theirs can be asked.
    "callbacks": {"algorithms.base", "checks", "data.base", "evaluation", "policies", "progress"},
    "trainer": {"acting", "callbacks"},
    "commands": BELOW_COMMANDS,
    "training_cli": {*BELOW_COMMANDS, "trainer"},
    "cli": {*BELOW_COMMANDS, "commands", "trainer", "training_cli"},
    "__main__": {"cli"},
    "__init__": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """Return the dotted names of all modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == PACKAGE.name:
                names |= {f"{PACKAGE.name}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def test_package_has_the_modules_of_the_table():
    assert {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_module_imports_only_what_it_may(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = {own, "__version__", *MAY_IMPORT[own]}
    inside = {n.partition(".")[2] for n in imported(file) if n.startswith(f"{PACKAGE.name}.")}
    forbidden = {n for n in inside if not any(f"{n}.".startswith(f"{a}.") for a in allowed)}
    assert not forbidden


def test_only_main_imports_the_command_line():
    """Who imports the other way would have the table's consent only as ``__main__``."""
    importers = {f.name for f in FILES if f"{PACKAGE.name}.cli" in imported(f)}
    assert importers == {"__main__.py"}


def test_report_loads_no_torch():
    code = "import sys, lightning_distill.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
