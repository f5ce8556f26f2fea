"""Launchers: Submitit's executors, which start `forge_hpc.run` on the nodes of an allocation, or here.

They know the configuration and start the run as a command: nothing of the run is imported, and no torch.
"""
