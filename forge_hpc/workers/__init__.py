"""Processes that compute what users write, rewards and environments: started, watched and ended by a pool."""
