"""Code that needs private parts of torch, and does not depend on graphs, terms or patterns."""
