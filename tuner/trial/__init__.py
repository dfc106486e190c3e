"""The contract between the tuner, a launcher and a program: a spec goes in, and a result comes out.

This room knows the nouns of `tuner.core`, but not why a layout was chosen.
"""
