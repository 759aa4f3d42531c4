"""Passes over a graph as Dynamo has captured it, before the steps or after them. A pass a file."""
