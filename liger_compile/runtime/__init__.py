"""State that exists during training, outside of compiled graphs."""
