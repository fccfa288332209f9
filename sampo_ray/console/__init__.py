"""The command line `sampo` and the demo; `session` has the commands that start Ray.

Nothing imports this folder. No logic lives here that a user of the package would need. `main` and what it imports at
its top stay free of heavy libraries, so that commands answer at once.
"""
