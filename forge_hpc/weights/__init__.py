"""Publishing and pulling weights by policy version, through TorchStore."""

from forge_hpc.weights.checksum import CorruptWeightsError
from forge_hpc.weights.layout import IncompleteVersionError
from forge_hpc.weights.links import LinkReader, links_dir
from forge_hpc.weights.memory import Unreachable
from forge_hpc.weights.offers import UNKNOWN, Brief, Known, Offer, Part, Place, Places
from forge_hpc.weights.remote import RemoteReader, Served
from forge_hpc.weights.snapshots import Opened, Snapshots, opened
from forge_hpc.weights.store import (
    MESSAGE_BYTES,
    StoreSpec,
    VersionExistsError,
    VersionNotFoundError,
    WeightStore,
    publish,
    publish_buckets,
    pull,
    reads_shared_memory,
)

__all__ = [
    "MESSAGE_BYTES",
    "UNKNOWN",
    "Brief",
    "CorruptWeightsError",
    "IncompleteVersionError",
    "Known",
    "LinkReader",
    "Offer",
    "Opened",
    "Part",
    "Place",
    "Places",
    "RemoteReader",
    "Served",
    "Snapshots",
    "StoreSpec",
    "Unreachable",
    "VersionExistsError",
    "VersionNotFoundError",
    "WeightStore",
    "links_dir",
    "opened",
    "publish",
    "publish_buckets",
    "pull",
    "reads_shared_memory",
]
