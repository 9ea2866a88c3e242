"""servicekit: what every crisp service needs, and nothing that is specific to one of them."""
