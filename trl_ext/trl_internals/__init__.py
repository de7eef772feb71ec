"""TRL's private parts: the only room of trl_ext that knows their names.

`seams` lists what is used, with checks. `mixins` wraps a trainer's methods and hands over to a `host`. The other files
read and write one topic of a trainer each: its state, rewards, generation, losses, forwards, models, runs and scripts.
"""
