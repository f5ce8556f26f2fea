"""What runs on every node of an allocation (`supervisor`), and all that is known of why a run ends.

ending              causes, exit codes, and what follows from a cause: the one table
lead, walltime      how long before its walltime a run leaves, and when that is
deadlines           how long a supervisor waits for what
signals             what a signal means, and how much time it leaves
job                 the Slurm job that this is
node                what every node has; `first_node`, `other_node`, `warm_start`, `controller_process`
coming_back         requeue, successor, or neither; `after_srun` where no supervisor is left to see to it
starts, heartbeat   starts.jsonl, and whether the controller lives
robust              going on where a file system fails
"""
