"""Machine details for bug reports: versions, platform, devices and the dtypes that they compute fast."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from cutlm import __version__

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "datasets", "openai"),
    *("bitsandbytes", "deepspeed", "vllm", "lm-eval"),
)


def describe_installation() -> str:
    """Describe it in lines; nothing is read from the environment or from files of the user."""
    return "\n".join([f"cutlm {__version__}", *_list_lines()])


def _list_lines() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name}: not installed"

    import torch

    from cutlm.model.loading import has_fast_math

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = ", ".join(name for name in ("bfloat16", "float16") if has_fast_math(getattr(torch, name)))
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"CPU: {cores} cores, {torch.get_num_threads()} threads, {capability}; fast besides float32: {fast or 'none'}"
    if torch.cuda.is_available():
        yield f"CUDA {torch.version.cuda or torch.version.hip}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False) and device.major >= 8
        memory = device.total_memory / 2**30
        yield f"GPU {index}: {device.name}, {memory:.1f} GiB, bfloat16: {'yes' if is_fast else 'no'}"
    if torch.backends.mps.is_available():
        yield "GPU: MPS"
