"""A trainer's transport and a look at the head for the tests, run inside a worker of any vLLM release."""

import inspect
from pathlib import Path

import torch
from safetensors.torch import load_file


class HeadLoader:
    """``worker_extension_cls``: changes the head's weight in the ways there are, and computes logits of given rows."""

    def head_logits(self, hidden_file: str, out: str) -> str:
        """Logits of the rows in a file, as the model's own ``compute_logits`` gives them, into a file for each rank."""
        model, rows = self.model_runner.get_model(), torch.load(hidden_file)
        old = "sampling_metadata" in inspect.signature(model.compute_logits).parameters
        with torch.inference_mode():
            found = model.compute_logits(rows.to(self.model_config.dtype), *([None] if old else []))
        if found is not None:
            torch.save({"logits": found, "contiguous": found.is_contiguous()}, f"{out}.{self.rank}")
        return "" if found is None else str(found.dtype)

    def scale_in_place(self, name: str, factor: float) -> int:
        """As a transport that writes into the parameter: the object and its storage stay."""
        weight = dict(self.model_runner.get_model().named_parameters())[name]
        before = weight.data_ptr()
        weight.data.mul_(factor)
        return int(weight.data_ptr() == before)

    def break_head(self, name: str) -> str:
        """As a bug would: the head goes on with a copy of its weight that no update reaches."""
        model = self.model_runner.get_model()
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        processor = next(module for module in model.modules() if isinstance(module, LogitsProcessor))
        stale = dict(model.named_parameters())[name].data.float().clone()
        size = processor.org_vocab_size
        processor.forward = lambda layer, hidden, *args, **kwargs: (hidden.float() @ stale.t())[:, :size].contiguous()
        return type(processor).__name__

    def mend_head(self) -> bool:
        """Take `break_head` off again."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        for module in self.model_runner.get_model().modules():
            if isinstance(module, LogitsProcessor):
                vars(module).pop("forward", None)
        return True

    def load_tensors(self, file: str) -> int:
        """As a transport that goes through the model's own ``load_weights``, in whatever dtype the tensors have."""
        tensors = load_file(Path(file))
        self.model_runner.get_model().load_weights(list(tensors.items()))
        return len(tensors)

    def parameter_dtype(self, name: str) -> str:
        """What the parameter is kept in."""
        return str(dict(self.model_runner.get_model().named_parameters())[name].dtype)
