"""transformers' private interfaces, checked with transformers 5.19.0.

A model's tensors have other names, and partly other shapes, in memory than in its checkpoint: the experts of a layer
are one tensor in memory and one each in the file, GPT-NeoX's head is `embed_out` there. `save_pretrained` turns all of
them back at once. Here it is done as they come: a model that is trained is never in one place as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict


def checkpoint_name(model: PreTrainedModel, weight: str) -> str | None:
    """The name in the checkpoint of the weight that has this name in memory; None where that is not the same tensor
    under another name, but a part of one, or made of several."""
    name, transform, _ = _Reverse(model).renamed(weight)
    return name if transform is None else None


def memory_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """By names of tensors in a checkpoint: what `from_pretrained` calls them in memory, if they are the model's."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    return {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in names}


def written_names(model: PreTrainedModel) -> set[str]:
    """The names of what `save_pretrained` writes of a model, which may be on the meta device."""
    return set(revert_weight_conversion(model, model.state_dict()))


class CheckpointFormat:
    """What `save_pretrained` writes of a model: which tensors, and under which names and in which shapes.

    `tensors` are all parameters and persistent buffers, a shared one under each of its names; only what they are is
    looked at, so they may be anywhere and hold anything. RuntimeError (transformers') for shared ones that the model's
    class does not tie.
    """

    def __init__(self, model: PreTrainedModel, tensors: Iterable[tuple[str, object]]) -> None:
        self._model = model
        stand_ins = defaultdict[int, Tensor](lambda: torch.empty(1))
        kept = {name: stand_ins[id(tensor)] for name, tensor in tensors}
        for name in model._keys_to_ignore_on_save or ():
            kept.pop(name, None)
        kept = remove_tied_weights_from_state_dict(kept, model)
        reverse, self._groups = _Reverse(model), dict[str, _Group]()
        self._by_target = groups = dict[str, _Group]()
        for name in sorted(kept, key=dot_natural_key):
            target, transform, pattern = reverse.renamed(name)
            self._groups[name] = group = groups.setdefault(target, _Group(target, transform))
            group.patterns[name] = pattern or name

    def __contains__(self, name: str) -> bool:
        """Whether the tensor of this name in memory is saved."""
        return name in self._groups

    def dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """`dtype` or, for a parameter that transformers keeps in fp32 when it loads a model in `dtype`, fp32."""
        if not (kept := list(self._model._get_dtype_plan(dtype))):
            return dtype
        return torch.float32 if build_glob_alternation(kept)[0].search(name) else dtype

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The names in memory, together those of which tensors of the checkpoint are made together."""
        return [tuple(group.patterns) for group in self._by_target.values()]

    def made_of(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors that are made of the tensors in memory of one group."""
        group = self._groups[next(iter(tensors))]
        if group.transform is None:
            yield group.target, next(iter(tensors.values()))
        else:
            yield from group.converted(tensors, self._model.config)

    def converted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, of those in memory: each as soon as all that it is made of have come.

        What must wait for others is copied to the CPU. A tensor that is given may be reused once the next is asked for,
        and so may those that are returned. RuntimeError unless all come.
        """
        waiting, missing = defaultdict[str, dict[str, Tensor]](dict), set(self._groups)
        for name, tensor in tensors:
            if (group := self._groups.get(name)) is None:
                continue
            missing.discard(name)
            members = waiting[group.target]
            members[name] = tensor if len(group.patterns) == 1 else tensor.to("cpu", copy=True)
            if len(members) == len(group.patterns):
                yield from self.made_of(waiting.pop(group.target))
        if missing:
            raise RuntimeError(f"no {min(missing)}, nor {len(missing) - 1} others, of the tensors that are to be saved")


def saved_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` writes of a model that is here as a whole, by the checkpoint's names."""
    tensors = model.state_dict(keep_vars=True)
    return CheckpointFormat(model, tensors.items()).converted(tensors.items())


@dataclass
class _Group:
    """Tensors in memory, by the pattern that their names match, that make up tensors of the checkpoint."""

    target: str
    transform: WeightConverter | None
    patterns: dict[str, str] = field(default_factory=dict)

    def converted(self, tensors: Mapping[str, Tensor], config: object) -> Iterator[tuple[str, Tensor]]:
        transform = deepcopy(self.transform)
        assert transform is not None
        for name, pattern in self.patterns.items():
            transform.add_tensor(self.target, name, pattern, tensors[name])  # type: ignore[arg-type]  # or a future
        # Of the model one operation wants the shape that a tensor has in memory, where it has the same name.
        memory = SimpleNamespace(get_parameter=tensors.__getitem__)
        for name, made in transform.convert(self.target, model=memory, config=config).items():
            yield name, made[0] if isinstance(made, list) else made


class _Reverse:
    """The reverse of what was done to names and tensors when the model was loaded (`_weight_conversions`) or, where it
    was made from a configuration, would have been."""

    def __init__(self, model: PreTrainedModel) -> None:
        done: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
        if done is None:  # whether the checkpoint would have had a prefix cannot be known
            all_of = get_model_conversion_mapping(model, add_legacy=False)
            done = [each for each in all_of if not isinstance(each, PrefixChange)]
        reverse = [each.reverse_transform() for each in reversed(done)]
        self._renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
        self._converters = [each for each in reverse if isinstance(each, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def renamed(self, name: str) -> tuple[str, WeightConverter | None, str | None]:
        """Its name in the checkpoint (the first, of several) and, if it is converted, by what and by which pattern.

        Some renamings depend on the names before: call it with all of a model in their natural order.
        """
        target, pattern = rename_source_key(name, self._renamings, self._converters, reverse=True)
        return target, None if pattern is None else self._by_pattern[pattern], pattern


@contextmanager
def loaded_tensors_stay() -> Iterator[None]:
    """Within, models are loaded as their files have them. Some classes set rows of what was loaded when they make up
    what was not: Youtu those of the padding token, Zaya a router's last bias. Wraps `_initialize_weights`, which spares
    loaded modules for code that is not transformers' own.
    """
    theirs = PreTrainedModel._initialize_weights

    def initialize(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        if not tensors or not all(getattr(each, "_is_hf_initialized", False) for each in tensors):
            theirs(self, module, is_custom_code)

    PreTrainedModel._initialize_weights = initialize  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = theirs  # type: ignore[method-assign]


class StandIn:
    """Stands for a tensor of a checkpoint when `from_pretrained` is given its tensors; becomes one without data.

    `dtype` is the type of its numbers, from then on the one that the model is loaded in.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, _: object) -> StandIn:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        self.dtype = dtype or self.dtype
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Recipe:
    """What the tensors of a model in memory are made of, as `from_pretrained` made them of a checkpoint's.

    While a model is loaded within `recorded`, it notes what that did.
    """

    def __init__(self) -> None:
        self._groups = dict[int, _Sources]()
        self._by_name = dict[str, _Sources]()

    @contextmanager
    def recorded(self) -> Iterator[Recipe]:
        """Wraps two methods of transformers' transforms, which are told of each tensor and name what they make."""
        add, renamed, converted = WeightTransform.add_tensor, WeightRenaming.convert, WeightConverter.convert

        def add_tensor(transform: WeightTransform, target: str, source: str, pattern: str, future: object) -> None:
            group = self._groups.setdefault(id(transform), _Sources(target, transform))
            group.tensors.append((source, pattern))
            add(transform, target, source, pattern, future)  # type: ignore[arg-type]

        def convert(transform: WeightTransform, *arguments: object, **settings: object) -> dict[str, object]:
            group, theirs = self._groups[id(transform)], renamed if isinstance(transform, WeightRenaming) else converted
            made: dict[str, object] = theirs(transform, *arguments, **settings)  # type: ignore[arg-type]
            self._by_name |= dict.fromkeys(made, group)
            return made

        changed: Any = (WeightTransform, WeightRenaming, WeightConverter)
        changed[0].add_tensor, changed[1].convert, changed[2].convert = add_tensor, convert, convert
        try:
            yield self
        finally:
            changed[0].add_tensor, changed[1].convert, changed[2].convert = add, renamed, converted

    def __contains__(self, name: str) -> bool:
        """Whether the tensor of this name in memory is from the checkpoint."""
        return name in self._by_name

    def stored_as(self, name: str) -> str | None:
        """The checkpoint's name of the tensor that this one is; None if it is made of others."""
        group = self._by_name[name]
        return group.tensors[0][0] if isinstance(group.transform, WeightRenaming) else None

    def made_with(self, name: str, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """This tensor and those that are made together with it, by their names in memory; `read` gives the tensors of
        the checkpoint. `model` has their shapes, by these names."""
        group = self._by_name[name]
        transform: Any = deepcopy(group.transform)
        for source, pattern in group.tensors:
            transform.add_tensor(group.target, source, pattern, read(source))
        made = transform.convert(group.target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


@dataclass
class _Sources:
    """Tensors of a checkpoint with the patterns that their names match, of which `transform` makes those in memory."""

    target: str
    transform: WeightTransform
    tensors: list[tuple[str, str]] = field(default_factory=list)
