"""Inside an allocation: who the nodes are, how they find and trust each other, and how all of it ends."""
