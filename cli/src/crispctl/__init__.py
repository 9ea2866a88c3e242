"""crispctl: the command for operators."""
