"""Engines that outlive a run, for the next one that is like it: ``forge-hpc submit --keep-engines 30m``."""
