"""What the measurements of a sweep say (ranking, drift, finals, the answer); knows finished trials, and nothing of
what runs next.
"""
