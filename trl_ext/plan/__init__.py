"""The plan of a run: order, claims, settings and checks, all before a trainer exists."""
