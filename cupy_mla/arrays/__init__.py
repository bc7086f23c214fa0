"""Arrays of any framework: what they are, where they lie, and memory for results."""
