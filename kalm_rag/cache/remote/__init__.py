"""A tier of encoded passages that several machines share, behind each one's own memory and disk."""
