"""TRL's GRPOTrainer with vLLM in the trainer's own process (`vllm_mode="colocate"`): `trl_colocate.py MODEL [GRPOConfig as
JSON]`.

Prints RESULT and what TRL logged of its own mismatch metrics, step by step.
"""

import vllm_compat  # noqa: F401, I001

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
        "temperature": 0.7, "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128,
    }  # fmt: skip
    given |= json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    trainer = GRPOTrainer(
        model=sys.argv[1],
        reward_funcs=lower_case,
        args=GRPOConfig(**given),
        train_dataset=Dataset.from_dict({"prompt": ["abcdefgh", "hello wo", "12345678", "ABCDEFGH"] * 8}),
    )
    trainer.train()
    steps = [log for log in trainer.state.log_history if "step_time" in log]
    print("RESULT " + json.dumps({name: [log[name] for log in steps] for name in steps[0] if name.startswith("sampling/")}))
