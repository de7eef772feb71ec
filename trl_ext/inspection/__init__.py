"""Rounds of a run, written down and shown: `recorder` writes what `recording` describes, `terminal` and `page` show it.

Reading and showing need neither torch nor TRL.
"""
