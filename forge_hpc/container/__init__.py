"""Runs in containers: what a site profile says of them (``slurm.container``), and how a run gets into one.

    Apptainer   srun ─► forge_hpc.run on the node (`outside`) ─► apptainer exec ─► forge_hpc.run, the run itself
    pyxis       job script: `relay` ─► srun --container-image … ─► forge_hpc.run, the run itself

runtimes  command lines of Apptainer, options of pyxis
mounts    what is seen inside
problems  what keeps a node, or all, from starting the container
relay     does outside what the run asks for: Slurm's commands; and hands signals in
outside   the node's process that starts Apptainer, and tells the gate where that fails
enter     a command in a container like the run's: ``forge-hpc attach``
"""
