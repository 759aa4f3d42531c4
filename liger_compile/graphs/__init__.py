"""Facts about a captured graph: aliases, in-place writes and their order, and the modes of each node."""
