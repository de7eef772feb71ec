"""`trl_ext compare`: one recipe, several arms, several seeds, and what can be concluded from them.

`recipe` reads the file, `preparing` checks it and names what determines a run, `running` trains one run in a process of
its own, `processes` keeps those processes, `records` keeps what they leave, `measures` and `stats` turn records into
numbers and intervals, `results` into verdicts, `picture` and `page` into what people look at.
"""
