"""`trl_ext compare`: one recipe, several arms, several seeds, and what can be concluded from them.

From the file to the page: `recipe` reads it, `prepare` checks it, `runs` names what determines each run, and `schedule`
has `run_one` train them in a `child_process` each. `store` keeps their records. `measures` and `statistics` turn these
into numbers and intervals, and `verdicts` into conclusions. `text_report`, `html_report` and `plots` show them.
"""
