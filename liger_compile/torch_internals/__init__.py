"""What needs private parts of torch, and knows nothing of graphs, terms or patterns."""
