"""crispctl: the operators' command."""
