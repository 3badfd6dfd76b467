"""verl's rollout server, the Ray actor that its agent loop asks: `verl_rollout.py MODEL`.

Started by `launch_server` with verl's own defaults for what a logprob depends on, asked with tokens in and tokens out; logprobs
of the same tokens by a trainer's model, and verl's own metrics of their difference. No weight update is made. Prints RESULT.
"""

import json
import sys

import ray
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

TEMPERATURE, TOKENS = 0.7, 32

if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(num_cpus=2, include_dashboard=False)
    config = OmegaConf.create({
        "_target_": "verl.workers.config.RolloutConfig", "name": "vllm", "dtype": "float32", "enforce_eager": True,
        "gpu_memory_utilization": 0.3, "tensor_model_parallel_size": 1, "max_model_len": 256, "prompt_length": 64,
        "response_length": TOKENS, "max_num_seqs": 16, "max_num_batched_tokens": 512, "enable_sleep_mode": False,
        "load_format": "auto", "ignore_eos": True,
    })  # fmt: skip
    server = ray.remote(vLLMHttpServer).remote(
        config=config, model_config=OmegaConf.create({"path": folder}), rollout_mode=RolloutMode.STANDALONE, workers=[],
        replica_rank=0, node_rank=0, gpus_per_node=1, nnodes=1, cuda_visible_devices="",
    )  # fmt: skip
    ray.get(server.launch_server.remote())
    prompts = [list(text.encode()) for text in ("abcdefgh", "hello wo", "12345678", "ABCDEFGH") for _ in range(4)]
    params = {"temperature": TEMPERATURE, "top_p": 1.0, "logprobs": True}
    asked = [server.generate.remote(prompt, dict(params), f"answer-{i}") for i, prompt in enumerate(prompts)]
    answers = ray.get(asked)
    responses = torch.tensor([list(answer.token_ids) for answer in answers])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(prompts), responses], 1)).logits[:, len(prompts[0]) - 1 : -1]
    trainer = (logits / TEMPERATURE).log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    found = calculate_debug_metrics(DataProto.from_dict({
        "rollout_log_probs": torch.tensor([list(answer.log_probs) for answer in answers]), "old_log_probs": trainer,
        "responses": responses, "response_mask": torch.ones_like(responses),
    }))  # fmt: skip
    print("RESULT " + json.dumps({name: [float(value)] for name, value in found.items()}))
