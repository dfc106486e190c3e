"""The part of megatune that acts: it starts, watches and ends the processes of trials, and holds the programs that
run inside them.
"""
