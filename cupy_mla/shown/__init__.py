"""How things are drawn in notebooks."""
