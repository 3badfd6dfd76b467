"""The scripts of examples/integrations and their pages; run is the one that needs nothing beyond this environment."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from types import ModuleType

import pytest
from support import ROOT

FOLDER, PAGES = ROOT / "examples" / "integrations", ROOT / "docs" / "integrations"
CLIENTS = sorted(file for file in FOLDER.glob("*.py") if file.name != "run.py")
PAGE = {
    "openai_client": "vllm_serve",
    "trl_colocate": "trl",
    "trl_server": "trl",
    "skyrl_client": "skyrl",
    "openrlhf_rollout": "openrlhf",
    "verl_rollout": "verl",
}


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """The driver, under a name of its own: `run` is too common a module to import."""
    spec = importlib.util.spec_from_file_location("integrations_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.stem)
def test_every_script_compiles(file) -> None:
    """No script has a syntax error, and each says what it is."""
    assert ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize("file", CLIENTS, ids=lambda file: file.stem)
def test_every_script_is_run_and_has_a_page(run, file) -> None:
    """The driver knows each script, and a page of the documentation names it and its framework is in the index."""
    assert file.stem in {case.client for case in run.CASES}
    page = PAGES / f"{PAGE[file.stem]}.md"
    assert file.name in page.read_text()
    assert f"({page.name})" in (PAGES / "README.md").read_text()


def test_the_index_names_every_page() -> None:
    """Each page of the folder is linked from its index."""
    index = (PAGES / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES.glob("*.md") if page.name != "README.md")


def test_the_results_are_of_todays_cases_and_in_the_page(run) -> None:
    """One result per case, its engine proven; the table in the page is what the results give."""
    results = json.loads(run.RESULTS.read_text())
    assert [(one["client"], one["setting"]) for one in results] == [(case.client, case.setting) for case in run.CASES]
    assert all(one["with"]["status"]["proven"] and one["without"]["status"] is None for one in results)
    assert f"{run.BEGIN}\n{run.table(results)}\n{run.END}" in run.PAGE.read_text()


def test_float32_is_rounding_with_vllm_compat(run) -> None:
    """Every maximum that a float32 client logged is below 1e-4 with vllm_compat; without, the raw clients are above 0.1."""
    worst = {}
    for one in json.loads(run.RESULTS.read_text()):
        maxima = [name for name in one["shows"] if "max" in name]
        if "float32" in one["setting"]:
            assert maxima
            assert all(value < 1e-4 for name in maxima for value in one["with"]["metrics"][name])
            worst[one["client"]] = max(value for name in maxima for value in one["without"]["metrics"][name])
    assert worst["openai_client"] > 0.1
    assert worst["skyrl_client"] > 0.1


def test_the_import_is_the_only_difference(run) -> None:
    """The driver takes out a line that is alone on its line, so a script without it is the framework's own."""
    for file in CLIENTS:
        lines = [line for line in file.read_text().splitlines() if "vllm_compat" in line and not line.startswith(run.IMPORT)]
        assert all(not line.lstrip().startswith(("from vllm_compat", "import vllm_compat")) for line in lines)


@pytest.mark.live
def test_the_openai_client_through_the_driver(run, tmp_path) -> None:
    """The shipped script and driver, on a real `vllm serve`: raw as it comes, rounding with the environment variable alone."""
    (case,) = (case for case in run.CASES if case.client == "openai_client")
    assert not case.standins
    assert not case.imports
    before, after = (run.run(case, tmp_path / "site", tmp_path / arm, arm == "with") for arm in ("without", "with"))
    assert before["metrics"]["T=1: max |difference|"][0] < 1e-4
    assert before["metrics"]["T=0.7: max |difference|"][0] > 0.1
    assert all(after["metrics"][name][0] < 1e-4 for name in case.shows)
    assert after["status"]["behaviors"]["processed_logprobs"]["sets"] == ["logprobs_mode='processed_logprobs'"]
