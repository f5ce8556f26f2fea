"""Publishing and pulling weights by policy version, through TorchStore."""

from forge_hpc.weights.layout import IncompleteVersionError
from forge_hpc.weights.store import (
    StoreSpec,
    VersionExistsError,
    VersionNotFoundError,
    WeightStore,
    publish,
    pull,
)

__all__ = [
    "IncompleteVersionError",
    "StoreSpec",
    "VersionExistsError",
    "VersionNotFoundError",
    "WeightStore",
    "publish",
    "pull",
]
