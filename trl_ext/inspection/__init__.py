"""Rounds of a run, written down and shown.

`recorder` writes what `file_format` describes. `terminal` and `html` show it, with texts and numbers as `formatting`
writes them, and `page_data` prepares everything for the page.

Reading and showing need neither torch nor TRL.
"""
