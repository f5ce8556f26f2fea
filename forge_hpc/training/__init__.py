"""The TorchTitan training engine."""
