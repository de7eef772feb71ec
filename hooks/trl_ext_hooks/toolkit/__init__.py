"""Toolkit: functions that methods share. Import its modules by name, because most of them import torch."""
