"""A transport for `test_diagnose.py`: the first half of the norms, then the second, in the model's own order.

Norms for the reason that `norms` gives. An order that transports use: one parameter after the other, as the model lists them.
"""

from pathlib import Path

from safetensors.torch import load_file


class HalfLoader:
    """``worker_extension_cls``: one half of the norms per call."""

    def load_half(self, folder: str, half: int) -> int:
        new = load_file(Path(folder) / "model.safetensors")
        held = [(name, value) for name, value in self.model_runner.model.named_parameters() if "norm" in name]
        middle = (len(held) + 1) // 2
        for name, value in held[:middle] if half == 0 else held[middle:]:
            value.data.copy_(new[name].to(value.dtype))
        return len(held)
