"""Facts about a captured graph: what shares memory, what is written and when, in which modes each node runs."""
