"""The private interfaces of libraries that this program reaches: names with a leading underscore, `_internal` and
`_private` packages, and undocumented inner workings. One module a library; importing it costs what the library costs.

Each function or class says what it reaches and with which version it was checked, and tests/test_internals.py has a
contract test for it, which fails once the library has another interface.
"""
