"""TorchTitan models from Hugging Face directories. Importing this package prepares torchtitan for the device."""

from forge_hpc.models.device import device_type, dist_backend, prepare_torchtitan

prepare_torchtitan()

__all__ = ["device_type", "dist_backend"]
