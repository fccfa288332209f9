"""The LoRA adapters of a replica: loaded when a request names one, unloaded once they are removed from the run."""

import asyncio
import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sampo_ray.errors import WeightsError
from sampo_ray.run.serving import read_serving
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import adapter_folder, adapter_model, adapter_of_model, is_version_number

logger = logging.getLogger("ray.serve")

LOOK_S, ENGINE_S = 10.0, 120.0


class ReplicaAdapters:
    """Adapters by their engine names (`adapter_model`), which say what is in them: one that is removed and added again
    with other weights is another adapter, to the engine and to its prefix cache.

    `load` and `unload` are the engine's. It gets files in `copies`, since it reads an adapter's again each time that it
    comes back to one of its few slots, which may be after they have been removed from the run.
    """

    def __init__(
        self,
        run: Place,
        copies: Path,
        load: Callable[[str, str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:
        self._run, self._copies, self._load, self._unload = run, copies, load, unload
        self._loaded, self._users = set[str](), Counter[str]()
        self._changing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def using(self, model: str) -> AsyncIterator[None]:
        """Around a request: within, the engine has the adapter. WeightsError when it is not in the run any more."""
        self._users[model] += 1
        try:
            async with self._changing:
                if model not in self._loaded:
                    copy = await asyncio.to_thread(self._copied, model)
                    await asyncio.wait_for(self._load(model, copy), ENGINE_S)
                    self._loaded.add(model)
            yield
        finally:
            self._users[model] -= 1

    async def unload_removed(self) -> None:
        """Unloads adapters that are not in the run any more and that no request uses."""
        served = (await asyncio.to_thread(read_serving, self._run)).adapters
        kept = {adapter_model(name, adapter.content) for name, adapter in served.items()}
        async with self._changing:
            for model in [each for each in self._loaded - kept if not self._users[each]]:
                self._loaded.discard(model)
                await asyncio.wait_for(self._unload(model), ENGINE_S)
                await asyncio.to_thread(shutil.rmtree, self._copy(model), ignore_errors=True)

    async def follow(self) -> None:
        """Looks at the run again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.unload_removed()
            except Exception as error:  # storage is away, or the engine, whose death another task sees
                logger.warning("adapters that were removed are still loaded: %s", error)

    def _copy(self, model: str) -> Path:
        return self._copies / model

    def _copied(self, model: str) -> str:
        """The path of a copy of the adapter's files."""
        name, content = adapter_of_model(model)
        if not content and not is_version_number(name):
            raise WeightsError(f"{model} was added before adapters were looked at; remove it and add it again")
        place = Place(adapter_folder(self._run.url, name, content))
        shutil.rmtree(self._copy(model), ignore_errors=True)
        with place.on_disk() as folder:
            if not folder.is_dir():
                raise WeightsError(f"{model} is not in the run any more")
            shutil.copytree(folder, self._copy(model))
        return str(self._copy(model))
