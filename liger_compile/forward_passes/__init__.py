"""Passes over the graph that Dynamo captured, before or after the steps. One pass per file."""
