"""`trl_ext train`: from the command line to a trained model."""
