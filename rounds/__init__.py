"""Rounds: the student writes, the teacher scores once, training goes on. Every stage is a command of
another package, in a process of its own.
"""
