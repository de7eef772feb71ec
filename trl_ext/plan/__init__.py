"""Plan of a run: order, claims, settings and checks of its plugins, all before a trainer exists."""
