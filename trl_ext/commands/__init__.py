"""The subcommands of `trl_ext`, one module each; `trl_ext.cli` has the table and says what a module must define."""
