"""The TorchTitan training engine."""

import forge_hpc.models  # noqa: F401  prepares torchtitan for the device before anything here imports it
