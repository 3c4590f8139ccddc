"""Long passages as windows: where they are split, and what calls on passages make of the windows."""
