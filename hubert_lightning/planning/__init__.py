"""Memory, time and disk of a run before it starts, from one model of what a GPU can do."""
