"""The plan: one text, the same everywhere, and it brings us along."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from packaging.version import Version

from vllm_compat.behaviors import ALL
from vllm_compat.patching.model import State
from vllm_compat.plan import KEY, Plan, PlanText, of
from vllm_compat.resolve import resolve


@pytest.fixture
def plan() -> Plan:
    return resolve(ALL, version=Version("0.32.0"), runner="v1", user={"seed": 3})


def test_round_trip(plan):
    """Text and back is the same plan, with the same digest."""
    assert Plan.parse(plan.text()) == plan
    assert Plan.parse(plan.text()).digest() == plan.digest()
    assert plan.digest() != plan.given_up("fp32_lm_head", State.FAILED, "x").digest()


def test_methods_travel(plan):
    """Methods that a profile names are in the text; a plan without any has the text of one that cannot have them."""
    assert "methods" not in json.loads(plan.text())
    named = dataclasses.replace(plan, methods=("load_norms",))
    assert Plan.parse(named.text()) == named
    assert named.digest() != plan.digest()


def test_another_format_is_refused(plan):
    """A plan of another release of vllm_compat is not half understood."""
    data = {**json.loads(plan.text()), "format": 99}
    with pytest.raises(ValueError, match="another release"):
        Plan.parse(json.dumps(data))


def test_text_in_a_configuration(plan):
    """It is a string to whoever hashes or prints the configuration, and survives copies."""
    config = type("Config", (), {"additional_config": {KEY: PlanText(plan.text())}})()
    assert json.loads(json.dumps(config.additional_config))[KEY] == plan.text()
    assert of(config) == plan
    assert of(copy.deepcopy(config)) == plan
    assert of(type("Config", (), {"additional_config": None})()) is None


def test_unpickling_activates(plan, run_python, tmp_path):
    """A spawned process that never imported us holds the plan's patches as soon as its configuration arrives."""
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps({"config": PlanText(plan.text())}))
    script = """
    import pickle, sys, json
    assert "vllm_compat" not in sys.modules
    found = pickle.load(open("plan.pickle", "rb"))["config"]
    from vllm_compat import bootstrap
    print("RESULT " + json.dumps([bootstrap.process.plan.text() == found, sorted({m.split(".")[0] for m in sys.modules} & {"vllm", "torch"})]))
    """
    assert run_python(script).ok().result == [True, []]
