"""Runs that a plugin owns: several trainings in place of one."""
