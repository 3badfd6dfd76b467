"""SkyRL's rollout client on a server: `skyrl_client.py MODEL BASE_URL`, where MODEL is the folder that the server serves.

What SkyRL's trainer does with a batch: generate over HTTP, pause and resume around a weight update (none happens here),
logprobs of the same tokens by the trainer's model at the sampling temperature, and SkyRL's own metric of their difference.
Prints RESULT.
"""

import asyncio
import json
import sys
import typing

import torch
import typing_extensions
from transformers import AutoModelForCausalLM, AutoTokenizer

typing.TypedDict = typing_extensions.TypedDict  # SkyRL 0.3.0 is for Python 3.12, where pydantic takes typing's own

from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient  # noqa: E402
from skyrl.backends.skyrl_train.utils.torch_utils import logprobs_from_logits  # noqa: E402
from skyrl.backends.skyrl_train.workers.worker_utils import compute_minibatch_rollout_logprob_diff_metrics  # noqa: E402

TEMPERATURE = 0.7


async def rollouts(folder, base_url, prompts):
    """SkyRL's answers: lists of token ids and their logprobs."""
    client = RemoteInferenceClient(proxy_url=base_url, server_urls=[base_url], data_parallel_size=1, model_name=folder)
    sampling = {"temperature": TEMPERATURE, "top_p": 1.0, "max_tokens": 32, "logprobs": 1}
    try:
        await client.pause_generation()
        await client.resume_generation()
        found = await client.generate({"prompt_token_ids": prompts, "sampling_params": sampling})
    finally:
        await client.teardown()
    return found["response_ids"], found["response_logprobs"]


if __name__ == "__main__":
    folder, base_url = sys.argv[1:3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.encode(text) for text in ("abcdefgh", "hello wo", "12345678", "ABCDEFGH") * 4]
    ours, theirs = [], []
    for prompt, tokens, logprobs in zip(prompts, *asyncio.run(rollouts(folder, base_url, prompts)), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[:, len(prompt) - 1 : -1]
        ours.append(logprobs_from_logits(logits / TEMPERATURE, torch.tensor([tokens]))[0])
        theirs.append(torch.tensor(logprobs))
    found = compute_minibatch_rollout_logprob_diff_metrics(torch.cat(ours)[None], torch.cat(theirs)[None], None)
    print("RESULT " + json.dumps({name: [value] for name, value in found.items()}))
