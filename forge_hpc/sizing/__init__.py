"""How much memory and time a run takes, by arithmetic, before there is a GPU to ask. Imports no torch."""
