"""OCI runtimes: how they are called, which ones this node offers by name, and what each can do here."""
