"""TRL's GRPOTrainer with its vLLM server (`trl vllm-serve`): `trl_server.py MODEL BASE_URL [GRPOConfig as JSON]`.

The server is a program of its own: VLLM_COMPAT_PROFILE=auto in its environment is all, this script has no line of ours.
Prints RESULT and what TRL logged of its own mismatch metrics, step by step.
"""

import json
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def lower_case(completions, **columns):
    """The share of lower-case letters in each completion."""
    return [sum(letter.islower() for letter in text) / max(1, len(text)) for text in completions]


if __name__ == "__main__":
    given = {
        "output_dir": "trl", "report_to": [], "save_strategy": "no", "logging_steps": 1, "max_steps": 4, "use_cpu": True,
        "learning_rate": 1e-3, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24,
        "temperature": 0.7, "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": sys.argv[2],
    }  # fmt: skip
    given |= json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    trainer = GRPOTrainer(
        model=sys.argv[1],
        reward_funcs=lower_case,
        args=GRPOConfig(**given),
        train_dataset=Dataset.from_dict({"prompt": ["abcdefgh", "hello wo", "12345678", "ABCDEFGH"] * 8}),
    )
    trainer.train()
    steps = [log for log in trainer.state.log_history if "step_time" in log]
    print("RESULT " + json.dumps({name: [log[name] for log in steps] for name in steps[0] if name.startswith("sampling/")}))
