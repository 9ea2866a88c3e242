"""servicekit: what each service needs to be a service, and nothing of what any one service is about."""
