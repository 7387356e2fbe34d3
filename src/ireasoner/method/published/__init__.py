"""The published label-free rewards: one paper in each module, whose function `reward` a recipe names by the module's
name.

Each of them is a function of a group and its context, as a reward of the user's own is: a module from here, copied to
`my_rewards.py`, is paid the same as `my_rewards.py:reward`. Its docstring names the source, and what was left out of
it. An unreadable trajectory earns 0 whatever they give, and must not earn more than a readable one: where the published
reward is negative, a constant is added to it for the readable ones of a group, which no difference from the mean of
their rewards depends on.
"""
