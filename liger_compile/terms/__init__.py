"""The term language: what the nodes of a graph compute, so that equal mathematics is one object."""
