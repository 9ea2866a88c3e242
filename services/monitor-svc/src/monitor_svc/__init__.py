"""monitor-svc: conmon, and with it stdio, logs, exec, exit codes and the event journal."""
