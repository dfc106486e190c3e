"""The contract between the tuner, a launcher and a program: spec in, result out; knows the nouns, and nothing of why
a layout was chosen.
"""
