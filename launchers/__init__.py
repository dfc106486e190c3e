"""The part of megatune that acts: it starts, watches and ends the jobs of trials, and holds their programs.

A launcher plans (`commands`) and starts (`local`) a job; `engine` runs the plan to its end with what `watch` sees.
"""
