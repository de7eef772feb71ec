"""The only part of trl_ext that knows private names of TRL.

`seams` lists what is used of it, with checks; `mixins` hooks trainers up; `access` reads and writes their private
state;
`scripts` reuses TRL's command line.
"""
