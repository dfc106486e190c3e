"""The contract between the tuner, a launcher and a program: a spec goes in, a result comes out. Knows the nouns, but
not why a layout was chosen.
"""
