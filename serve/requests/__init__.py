"""Request bodies: read, checked and bounded before anything acts on them.

`json_body` turns bytes into a JSON object, `openai` a JSON object into a request for a policy replica, and
`constraints` refuses what would keep the engine's grammar compiler busy. Every refusal is an ApiError (4xx) that names
the field and never its value. No routes and no state here. Imports go to serve.errors and serve.middleware.limits.
"""
