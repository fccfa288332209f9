"""The files of a pretrained model, in a Hugging Face folder or under a hub name: which there are, and what they say.

Of weights only the headers of safetensors files are read. What is wrong is one ConfigError, which begins with the field
of the recipe and its value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sampo_ray.errors import ConfigError, first_line

Field = Literal["model.path", "reward.model"]
"""The fields of a recipe that name a model."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
"""How files of weights end in formats that are not read: loading them can run code, or needs other libraries."""
QUANTIZED_BY = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which older tools say how they quantised a model."""
PLAIN_TYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
"""Types of tensors, as safetensors names them, in a checkpoint that is not quantised; I64 and BOOL in buffers."""
DEQUANTIZING = {"mxfp4": "Mxfp4Config(dequantize=True)", "fp8": "FineGrainedFP8Config(dequantize=True)"}
"""What `from_pretrained` takes as `quantization_config` to load plain weights, by the method of quantisation."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint as the header of its file has it; `dtype` is safetensors' name, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files. `field` and `path` are a recipe's, `folder` has those that are on this machine."""

    field: Field
    path: str
    folder: Path
    names: frozenset[str]

    @classmethod
    def find(cls, field: Field, path: str) -> ModelFiles:
        """ConfigError if there is no such folder, and no such name on the hub or, without network, in its cache."""
        try:
            if (folder := Path(path)).is_dir():
                return cls(field, path, folder, frozenset(os.listdir(folder)))
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja"]))
            names = set(os.listdir(folder))
            if not is_offline_mode() and not has_weights(folder):
                names |= set(HfApi().list_repo_files(path))
        except (OSError, ValueError, HTTPError) as error:
            no_name = isinstance(error, HFValidationError)
            reason = "no such folder, nor a possible name on the hub" if no_name else first_line(error)
            raise ConfigError(
                f"{field}={path!r}: no model can be opened there ({reason}); name a Hugging Face folder or hub name"
            ) from None
        return cls(field, path, folder, frozenset(names))

    def error(self, what: str) -> ConfigError:
        """The error that says `what` of this model."""
        return ConfigError(f"{self.field}={self.path!r}: {what}")

    def settings(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. ConfigError if it is none."""
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise self.error(f"its {name} is damaged ({first_line(error)}); download or save the model again") from None
        if not isinstance(found, dict):
            raise self.error(f"its {name} is damaged (no JSON object); download or save the model again")
        return found

    def check_kind(self) -> None:
        """ConfigError unless the folder is of one whole model that is not quantised."""
        weights = any(name.startswith(("model", "pytorch_model")) for name in self.names if not name.endswith(".json"))
        if "model_index.json" in self.names:
            raise self.error("is a diffusers pipeline; name a language model")
        if "adapter_config.json" in self.names and "config.json" in self.names and weights:
            raise self.error(
                "has an adapter_config.json beside a whole model, to which transformers would attach that adapter; "
                "move the adapter's files out of the folder, or merge it into the model"
            )
        if "adapter_config.json" in self.names:
            base = self.settings("adapter_config.json").get("base_model_name_or_path")
            raise self.error(
                f"holds an adapter of {base or 'a model'} and no model; merge it (merge_and_unload of peft) and save "
                "the whole model, or name the model that it is for"
            )
        if "config.json" not in self.names:
            self._check_gguf()
            raise self.error("no model can be opened there (it has no config.json); name a Hugging Face folder")
        self._check_quantized()

    def _check_gguf(self) -> None:
        if found := sorted(name for name in self.names if name.endswith(".gguf")):
            raise self.error(f"its weights are in {found[0]}, a GGUF file; name the model from which that was made")

    def _check_quantized(self) -> None:
        settings = self.settings("config.json")
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
        found = [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]
        said = next((each for each in found if each is not None), None)
        files = sorted(self.names & set(QUANTIZED_BY))
        if said is None and not files:
            return
        method = str(said.get("quant_method", "an unnamed method") if isinstance(said, dict) else files[0])
        how = "name the model from which it was made"
        if method in DEQUANTIZING:
            how += f", or load it with quantization_config={DEQUANTIZING[method]} and save it with save_pretrained"
        elif method == "bitsandbytes":
            how += ", or load it, call its dequantize() and save it with save_pretrained"
        raise self.error(f"is quantised ({method}), and training needs plain weights; {how}")

    def weights(self, config: Mapping[str, Any]) -> dict[str, Weight]:
        """The tensors of the files that transformers loads for a model with this config.json, by their names there.

        ConfigError if there are none in safetensors files, or one of these is missing or damaged.
        """
        found = dict[str, Weight]()
        for file in self._weight_files(config.get("transformers_weights")):
            found |= self._header(file)
        other = {weight.dtype: name for name, weight in found.items() if weight.dtype not in PLAIN_TYPES}
        if other:
            dtype, name = next(iter(other.items()))
            raise self.error(
                f"is quantised ({name} has the type {dtype}), and training needs plain weights; name the model from "
                "which it was made"
            )
        return found

    def _weight_files(self, named: str | None) -> list[str]:
        first = named or (WEIGHTS if WEIGHTS in self.names else INDEX)
        if first not in self.names:
            raise self._no_weights()
        if not first.endswith(".index.json"):
            return [first]
        shards = self.settings(first).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise self.error(f"its {first} is damaged (no weight_map); download or save the model again")
        files = sorted(set(map(str, shards.values())))
        if missing := [file for file in files if file not in self.names and not (self.folder / file).is_file()]:
            raise self.error(
                f"its {first} names {missing[0]}, which is missing ({len(missing)} of {len(files)} files are); "
                "download or save the model again"
            )
        return files

    def _no_weights(self) -> ConfigError:
        self._check_gguf()
        if other := sorted(name for name in self.names if name.endswith(OTHER_WEIGHTS) and "model" in name):
            return self.error(
                f"its weights are in {other[0]}, and only safetensors files are read, since others can run code; load "
                "it with transformers and save it with save_pretrained"
            )
        there = sorted(name for name in self.names if name.endswith(".safetensors"))
        other_names = f", but {there[0]}" if there else ""
        return self.error(
            f"has no weights: no {WEIGHTS} and no {INDEX}{other_names}; save the model with save_pretrained, or "
            "download all of its files"
        )

    def _header(self, file: str) -> dict[str, Weight]:
        try:
            if self.folder != Path(self.path) and not (self.folder / file).exists():  # on the hub, not in its cache
                tensors = HfApi().parse_safetensors_file_metadata(self.path, file).tensors
                return {name: Weight(file, each.dtype, tuple(each.shape)) for name, each in tensors.items()}
            with safe_open(self.folder / file, "np") as opened:  # torch would reserve memory for all of it
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {name: Weight(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (OSError, HTTPError, SafetensorError, SafetensorsParsingError) as error:
            raise self.error(f"its {file} is damaged ({self._damage(file, error)}); download it again") from None

    def _damage(self, file: str, error: Exception) -> str:
        path = self.folder / file
        if path.is_file() and path.open("rb").read(11) == b"version htt":
            return "a Git LFS pointer without its content; fetch that with `git lfs pull`"
        return first_line(error)

    def read(self, name: str, weight: Weight) -> Tensor:
        """One tensor of a checkpoint."""
        with safe_open(self.on_disk(weight.file), "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def on_disk(self, file: str) -> Path:
        """The path of one of its files, which is fetched from the hub if it is not here."""
        path = self.folder / file
        return path if path.exists() else Path(hf_hub_download(self.path, file))


def has_weights(folder: Path) -> bool:
    """Whether a folder of the hub's cache has all files of weights, so that the hub need not be asked."""
    if not (folder / INDEX).exists():
        return (folder / WEIGHTS).exists()
    shards = json.loads((folder / INDEX).read_bytes()).get("weight_map", {}).values()
    return all((folder / file).exists() for file in shards)
