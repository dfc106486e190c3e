"""What the measurements of a sweep say: ranking, drift, finals and the answer. Knows finished trials; does not know
what runs next, except in the finals.
"""
