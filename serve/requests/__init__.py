"""Request bodies: read, checked and bounded before anything acts on them. No routes and no state here.

Every refusal is an ApiError (4xx) that names the field and never its value.
"""
