"""GPUs that only Ray counts: for tests of whole runs on machines without any. Reads SAMPO_LOGICAL_GPUS, and alone does.

With SAMPO_LOGICAL_GPUS=1, in a driver on a Ray that was started with more `num_gpus` than the machine has, plans are
made and actors are placed as on GPUs. What they compute they compute on CPUs: ranks by gloo, engines by vLLM's build
for CPUs. Nothing else changes. It says nothing of what GPUs compute.
"""

import os


def logical_gpus() -> bool:
    """Whether actors that hold GPUs compute on CPUs."""
    return os.environ.get("SAMPO_LOGICAL_GPUS") == "1"
