"""Utilities for every part of the package: paths, progress bars, turns, forks, checks and digests."""
