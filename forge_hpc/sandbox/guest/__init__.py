"""What runs inside the sandbox: the standard library alone, Python 3.10 or newer. The host imports only ``frames``."""
