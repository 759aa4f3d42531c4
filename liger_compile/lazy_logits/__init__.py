"""Answers questions about lazy logits from the hidden state and the head, in chunks, without the logits."""
