"""``bda-fx``: inspect, rewrite, export, verify and time models from the command line.

Importing this package loads nothing; ``bda_fx.cli.app`` holds the commands.
"""
