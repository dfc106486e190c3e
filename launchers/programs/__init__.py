"""The programs that run inside a trial, and what they share (`harness`).

They know the contract of a trial, the nouns (`tuner.core`) and their own framework; they know neither the tuner's state
nor each other.
"""
