"""`trl_ext train`: command line, launch, worker, progress and summary."""
