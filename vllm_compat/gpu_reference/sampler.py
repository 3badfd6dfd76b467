"""A release's sampler on tensors of a device, without an engine: what our self-test of a worker asks, asked of its source.

python -m vllm_compat.gpu_reference.sampler OUT [--device cuda|cpu]

The `vllm` that can be imported is taken, which may be an unpacked wheel (PYTHONPATH) whose compiled parts do not load here; its
Python dependencies have to be there. Prompt rows are the model runner's, and are not asked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_compat import bootstrap, vllm_info
from vllm_compat.behaviors import processed_logprobs
from vllm_compat.patching import replace
from vllm_compat.patching.model import CheckFailed
from vllm_compat.resolve import within

LIMIT = 1e-4  # nats, the self-test's own
_ROOM = 16


def main() -> int:
    """Exit code 1 where a row is not V0's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for report.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    bootstrap.deactivate()  # there is no engine whose plan would say which patches are due
    import torch

    installed = vllm_info.installed()
    assert installed is not None  # the step is not run without
    module = importlib.import_module("vllm.v1.sample.sampler")
    patched = []
    for patch in processed_logprobs.BEHAVIOR.patches():
        if patch.target.module == module.__name__ and within(installed.release, patch.versions):
            replace.install(module, patch, str(installed.root))
            patched.append(patch.name)
    # What vLLM's logits processors read of an engine's configuration; from 0.10.2 on the option does what `logprobs_mode` asks.
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=_ROOM), speculative_config=None,
        model_config=SimpleNamespace(logits_processors=None),
    )  # fmt: skip
    mode = getattr(getattr(module, "LogprobsMode", None), "PROCESSED_LOGPROBS", "processed_logprobs")  # an enum in 0.10.2
    try:
        sampler = module.Sampler(logprobs_mode=mode)
    except TypeError:
        sampler = module.Sampler()
    failed, worst = "", 0.0
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        try:
            worst = processed_logprobs.sampled_rows(sampler, config, torch.device(args.device))
        except CheckFailed as error:
            failed = str(error)
    print(failed or f"vLLM {installed.version}, {args.device}: within {worst:.1g} nats of V0's formula; replaced: {patched}")
    band = {"metric": "nats from V0's formula, worst of all settings", "value": None if failed else worst, "limit": LIMIT}
    found = {"bands": [{**band, "held": not failed}], "found": {"made_by": {"device": args.device}}, "failed": failed}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
