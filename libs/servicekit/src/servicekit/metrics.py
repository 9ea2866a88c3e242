"""Prometheus metrics that every service has. A service adds its own with prometheus_client."""

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

REQUESTS = Histogram(
    "crisp_request_seconds", "Time to answer a request, by route", ["route", "method", "status"], buckets=_BUCKETS
)
IN_FLIGHT = Gauge("crisp_requests_in_flight", "Requests being answered now")
CALLS = Histogram(
    "crisp_call_seconds",
    "Time that a call to another service took, retries included",
    ["service", "method", "status"],
    buckets=_BUCKETS,
)
CALL_RETRIES = Counter("crisp_call_retries_total", "Calls sent again because a replica went away", ["service"])
