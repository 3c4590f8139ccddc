"""What every room of the package may use: paths, progress bars, turns and forks."""
