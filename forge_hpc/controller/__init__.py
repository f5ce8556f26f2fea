"""The controller: the one process that runs the recipe, and what it holds of trainers, generators and weights."""
