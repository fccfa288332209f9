"""The command line and the demo. No logic that somebody who imports the package would need."""
