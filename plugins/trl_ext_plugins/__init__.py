"""The built-in methods, one module each. They are asked for by name; see `trl_ext plugins`."""
