"""Training from the command line: arguments, launch, worker processes, progress and summary."""
