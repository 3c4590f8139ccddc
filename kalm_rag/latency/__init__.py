"""What a call may cost: scoring within a budget of time, and passages that are encoded in the background."""
