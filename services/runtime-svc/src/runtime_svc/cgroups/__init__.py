"""Control groups: both kernel versions, both drivers, limits, counters and statistics.

Nothing outside this package asks which version the machine has; it asks a `Cgroups` what it needs.
"""
