"""The command `opd`: one door to everything that a person does with this project.

What a command needs is imported when that command is used: help is there at once.
"""
