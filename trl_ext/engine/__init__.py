"""The plugins of one trainer at work."""
