"""OpenRLHF's rollout actor on Ray, as its PPO trainer starts it: `openrlhf_rollout.py MODEL`.

Engines by `create_vllm_engines` and answers by `generate_responses`, with the arguments of `train_ppo_ray` where importance
sampling correction is on; logprobs of the same tokens by a trainer's model in bfloat16, and by OpenRLHF's formula its
metric `vllm_kl` (its own code for both needs deepspeed). No weight update is made: it wants NCCL. The one GPU that Ray is
told of is a name: the engine takes the CPU. Prints RESULT.
"""

import json
import sys

import ray
import torch
from openrlhf.trainer.ray.vllm_engine import create_vllm_engines
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

TEMPERATURE = 0.7

if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=True)
    (engine,) = create_vllm_engines(
        num_engines=1, tensor_parallel_size=1, pretrain=folder, seed=42, full_determinism=False, enable_prefix_caching=False,
        enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.3, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampling = SamplingParams(temperature=TEMPERATURE, top_p=1.0, max_tokens=32, logprobs=1)
    asked = [
        engine.generate_responses.remote(text, "", sampling, 256, tokenizer, num_samples=4)
        for text in ("abcdefgh", "hello wo", "12345678", "ABCDEFGH")
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    gaps = []
    for answer in (answer for answers in ray.get(asked) for answer in answers):
        tokens = torch.tensor([answer["observation_tokens"]])
        start, end = answer["action_ranges"][0]
        with torch.no_grad():
            logits = model(tokens).logits[0, start - 1 : end - 1].float()
        trainer = (logits / TEMPERATURE).log_softmax(-1).gather(1, tokens[0, start:end, None])[:, 0]
        gaps.append(torch.tensor(answer["rollout_log_probs"][start:end]) - trainer)
    found = torch.cat(gaps)
    print("RESULT " + json.dumps({"vllm_kl": [found.mean().item()], "mean |difference|": [found.abs().mean().item()]}))
