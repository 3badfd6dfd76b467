"""
Stand-ins for a GPU, each asked for by name in CPU_STANDINS (comma-separated). They are no part of vllm_compat.

- ``weights``: vLLM's CPU engine packs the linear layers' weights when it loads a model, and what trainers call on a GPU,
  ``model.load_weights``, then finds no weights. The layers keep them and use torch's own product, as on a GPU.
- ``float32``: ``dtype="auto"`` makes a float32 checkpoint bfloat16. It stays float32, so that a difference is a difference
  in meaning, not in rounding; for clients that do not let their user choose the engine's dtype.
- ``nccl``: the tensors of vLLM's weight transfer engine "nccl" travel through torch's TCPStore. Requests, their order and
  the layerwise reload in the engine are vLLM's own. The trainer needs it too: `python -m cpu_standins SCRIPT ...`, which
  also passes TRL's check for a CUDA device.
"""

import os
import runpy
import sys


def register() -> None:
    """vLLM's general plugin, in every process of an engine."""
    wanted = set(filter(None, os.environ.get("CPU_STANDINS", "").split(",")))
    for name in sorted(wanted):
        _KNOWN[name]()


def _weights() -> None:
    import torch
    from vllm.model_executor.layers import utils

    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _float32() -> None:
    import torch
    from vllm.config import model

    def _resolve_auto_dtype(model_type, config_dtype, **kwargs):
        return torch.float32

    model._resolve_auto_dtype = _resolve_auto_dtype


class _Store:
    """What both ends use of an NCCL communicator."""

    def __init__(self, host, rank, port, world_size):
        from vllm.distributed.utils import StatelessProcessGroup

        self.group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)

    def send(self, tensor, src):
        self.group.broadcast_obj(tensor.detach().cpu().contiguous(), src)

    def receive(self, src):
        return self.group.broadcast_obj(None, src)

    def destroy(self):
        self.group = None


def _nccl() -> None:
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    def trainer_init(init_info, rank=0):
        return _Store(init_info["master_address"], rank, init_info["master_port"], init_info["world_size"])

    def worker_init_process_group(init_info, parallel_config):
        rank = init_info.rank_offset + parallel_config.data_parallel_index * parallel_config.world_size + parallel_config.rank
        return _Store(init_info.master_address, rank, init_info.master_port, init_info.world_size)

    def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func, **buffers):
        for item in iterator:
            group.send(post_iter_func(item), src)

    def packed_nccl_broadcast_consumer(iterator, group, src, post_unpack_func, **buffers):
        for name, _ in iterator:
            post_unpack_func([(name, group.receive(src))])

    # before vLLM's engine and TRL take these names out of their modules
    nccl_common.trainer_init, nccl_common.worker_init_process_group = trainer_init, worker_init_process_group
    packed_tensor.packed_nccl_broadcast_producer = packed_nccl_broadcast_producer
    packed_tensor.packed_nccl_broadcast_consumer = packed_nccl_broadcast_consumer


def _any_device() -> None:
    """TRL's client asks for a CUDA device before it opens its end."""
    from trl.generation.vllm_client import VLLMClient

    original = VLLMClient.init_communicator
    VLLMClient.init_communicator = lambda self, device=0: original(self, device="cuda")


_KNOWN = {"weights": _weights, "float32": _float32, "nccl": _nccl}

if __name__ == "__main__":
    register()
    _any_device()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
