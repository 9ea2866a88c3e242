"""OCI runtimes: their command line, the handlers that name them, and what each can do here."""
