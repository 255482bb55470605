"""What every vLLM engine here needs of its process, before vLLM is imported."""

import os


def set_vllm_environment(*, tensor_parallel_size: int, on_gpu: bool) -> None:
    """Set vLLM's environment variables; what a user has set stays, but for the model runner."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # What we hook into, logits processors and the workers' scoring, is of the first model runner, the only one on CPUs.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if tensor_parallel_size > 1 and not on_gpu:
        # vLLM would give each of the engine's workers a NUMA node of its own, and most hosts have one.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
