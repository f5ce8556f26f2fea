"""The environment on each node's own disk, where importing it from a shared file system takes minutes on many nodes.

pack       one archive a version of the environment, on the shared disk
broadcast  in the job script: pack what is not packed, bring it to the nodes that lack it
start.sh   on each node: unpack it once, and run from there
"""
