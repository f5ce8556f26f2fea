"""The supervisor: what runs on every node, owns its processes, and sees that a run ends truthfully or comes back."""
