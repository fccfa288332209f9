"""How a policy replica makes weights of a version of LoRA adapters."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sampo_ray.actors.weights.client import throttle
from sampo_ray.run.buckets import Bucket, checksum, flat, unpack, verify, views
from sampo_ray.training.lora import MATRICES, file_name, merged


def merging(adapters: Bucket, scaling: float, share: float = 1.0) -> Callable[[Bucket], Bucket]:
    """A function that merges adapters into a bucket of their base; works no more than `share` of the time.

    Both raise WeightsError for damaged bytes.
    """
    parts = dict(unpack(adapters))

    def merge(bucket: Bucket) -> Bucket:
        adapted = [spec for spec in bucket.specs if file_name(spec.name, "A") in parts]
        if not adapted:
            return bucket
        begun = time.perf_counter()
        verify(bucket)
        data = bucket.data.copy()
        throttle(begun, share)
        for spec, (name, weight) in zip(adapted, views(adapted, flat(bucket.data)), strict=True):
            begun = time.perf_counter()
            a, b = (parts[file_name(name, side)] for side in MATRICES)
            new = merged(weight, a, b, scaling).to(weight.dtype)
            flat(data)[spec.offset : spec.offset + spec.nbytes] = new.view(torch.uint8).flatten()
            throttle(begun, share)
        return replace(bucket, data=data, checksum=checksum(data))

    return merge
