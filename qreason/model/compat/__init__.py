"""Whatever bends the inside of a library or relies on it, one file per library, or two.

tests/test_compat.py asks the installed libraries whether they still work that way.
"""
