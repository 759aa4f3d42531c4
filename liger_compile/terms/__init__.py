"""The term language: one object for each mathematical value that the nodes of a graph compute."""
