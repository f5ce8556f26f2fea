"""TorchStore 0.1.2 under Monarch 0.7.0: the only module that imports TorchStore.

Why: TorchStore 0.1.2 was written for Monarch 0.1.2. Its ``Controller`` actor mixes sync and async endpoints, which
Monarch 0.7.0 refuses (``ValueError: ... mixes both async and sync endpoints``) as soon as the actor is spawned.
:class:`StoreController` declares the sync ones again as async. It is a subclass, pickled by the name of this module, so
that every process that meets it imports this module first: nothing has to be patched beforehand. Importing TorchStore
also lowers the level of the root logger unless ``HYPERACTOR_CODEC_MAX_FRAME_LENGTH`` is set, so it is set here.

It can go when TorchStore's metadata allows this Monarch (then spawn ``torchstore.controller.Controller`` itself). Other
versions of either package are refused: look again at which endpoints are sync before changing ``TESTED``.
"""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version
from typing import Any

from monarch.actor import endpoint

TESTED = {"torchstore": "0.1.2", "torchmonarch": "0.7.0"}

for _package, _tested in TESTED.items():
    if version(_package) != _tested:
        raise ImportError(
            f"{_package} is {version(_package)}, but forge_hpc.weights is written for {_tested}; "
            f"install {_package}=={_tested} or review {__name__}"
        )

# Largest Monarch message in bytes; what TorchStore sets itself, with a warning, where it is missing.
os.environ.setdefault("HYPERACTOR_CODEC_MAX_FRAME_LENGTH", "910737418240")

from torchstore.client import LocalClient  # noqa: E402
from torchstore.controller import Controller  # noqa: E402
from torchstore.storage_volume import StorageVolume  # noqa: E402
from torchstore.strategy import TorchStoreStrategy  # noqa: E402
from torchstore.transport.buffers import MonarchTransportBuffer, TransportBuffer  # noqa: E402
from torchstore.transport.pipe import Pipe, Request  # noqa: E402

__all__ = [
    "LocalClient",
    "MonarchTransportBuffer",
    "Pipe",
    "Request",
    "StoreController",
    "StoreVolume",
    "TorchStoreStrategy",
    "TransportBuffer",
]


def _as_async(name: str) -> Any:
    method = getattr(Controller, name)._method
    if inspect.iscoroutinefunction(method):
        raise ImportError(f"torchstore's Controller.{name} is async already: review {__name__}")

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    call.__name__ = name
    call.__doc__ = method.__doc__
    return endpoint(call)


class _Lenient:
    """An actor whose answer to a process that has died is lost, and nothing else: by default it would fail itself."""

    async def _handle_undeliverable_message(self, message: Any) -> bool:
        return True


class StoreController(_Lenient, Controller):
    """TorchStore's index of keys, with every endpoint async."""

    get_controller_strategy = _as_async("get_controller_strategy")
    locate_volumes = _as_async("locate_volumes")
    notify_put = _as_async("notify_put")
    keys = _as_async("keys")
    notify_delete = _as_async("notify_delete")


class StoreVolume(_Lenient, StorageVolume):
    """TorchStore's volume, by a name of this module.

    Monarch unpickles the actors of a process on threads of their own; were one named by TorchStore and another by this
    module, both imports at once would meet a half-initialised ``torchstore`` (seen as an ImportError).
    """
