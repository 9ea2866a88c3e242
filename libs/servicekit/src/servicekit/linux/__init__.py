"""Everything that talks to the kernel, for all services.

Imports nothing of crisp but servicekit.errors.
"""
