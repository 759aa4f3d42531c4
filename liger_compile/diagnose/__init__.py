"""What a near miss differs in: the difference between two terms, and a sentence that names it."""
