"""A registry over the OCI distribution API (distribution-spec 1.1): manifests, blobs, and the token it may want first.

Everything here blocks and runs in threads: a layer's bytes go from the socket to the inflater without a queue between.
"""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager

from crisp_proto.image import PullRequest
from image_svc.manifests import INDEX_TYPES, MANIFEST_TYPES, Descriptor
from image_svc.references import Reference
from image_svc.registries_conf import Endpoint, RegistriesConf, decode_basic
from servicekit.errors import CrispError, Internal, NotFound, PermissionDenied, Unauthenticated, Unavailable
from servicekit.imports import hidden

with hidden("rich"):
    import httpx

_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_PIECE = 1 << 18


class Repository:
    """A repository at the first of its endpoints that answers for it."""

    def __init__(self, reference: Reference, conf: RegistriesConf, auth: PullRequest, timeout: float) -> None:
        self._reference = reference
        self._endpoints = conf.endpoints(reference)
        self._conf = conf
        self._auth = auth
        self._tokens: dict[str, str] = {}
        self._chosen: Endpoint | None = None
        self._clients = {
            insecure: httpx.Client(
                timeout=httpx.Timeout(timeout, connect=min(timeout, 10)), verify=not insecure, follow_redirects=True
            )
            for insecure in (False, True)
            if any(e.insecure == insecure for e in self._endpoints)
        }
        self._schemes: dict[str, str] = {}

    def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            client.close()

    def manifest(self, wanted: str) -> bytes:
        """The manifest or index for a tag or digest, from the first endpoint that has it."""
        last: CrispError | None = None
        for endpoint in [self._chosen] if self._chosen else self._endpoints:
            try:
                with self._get(
                    endpoint, f"manifests/{wanted}", accept=", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
                ) as response:
                    raw = response.read()
            except CrispError as error:
                last = error
                continue
            self._chosen = endpoint
            return raw
        assert last is not None
        raise last

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob as the registry sends them."""
        assert self._chosen is not None
        with self._get(self._chosen, f"blobs/{descriptor.digest}") as response:
            yield self._pieces(response, descriptor)

    def _pieces(self, response: httpx.Response, descriptor: Descriptor) -> Iterator[bytes]:
        try:
            yield from response.iter_raw(_PIECE)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{self._reference}: the registry broke off in the middle of {descriptor.digest}: {error}; pull again"
            ) from error

    @contextmanager
    def _get(self, endpoint: Endpoint, path: str, accept: str = "*/*") -> Iterator[httpx.Response]:
        url = f"{endpoint.host}/v2/{endpoint.repository}/{path}"
        headers = {"accept": accept, "accept-encoding": "identity"}
        for attempt in (1, 2):
            token = self._tokens.get(endpoint.host)
            if token:
                headers["authorization"] = token
            with self._send(endpoint, url, headers) as response:
                if response.status_code == 401 and attempt == 1:
                    self._tokens[endpoint.host] = self._authorization(
                        endpoint, response.headers.get("www-authenticate", "")
                    )
                    continue
                self._raise_for(response, endpoint, path)
                yield response
                return

    @contextmanager
    def _send(self, endpoint: Endpoint, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        known = self._schemes.get(endpoint.host)
        schemes = [known] if known else ["https", "http"] if endpoint.insecure else ["https"]
        client = self._clients[endpoint.insecure]
        error: httpx.HTTPError | None = None
        for scheme in schemes:
            try:
                response = client.send(client.build_request("GET", f"{scheme}://{url}", headers=headers), stream=True)
            except httpx.HTTPError as failed:
                error = failed
                continue
            self._schemes[endpoint.host] = scheme
            try:
                yield response
            finally:
                response.close()
            return
        raise Unavailable(
            f"registry {endpoint.host} is not reachable for {self._reference}: {error}; check its name, the network, and whether it needs insecure = true in registries.conf"
        ) from error

    def _raise_for(self, response: httpx.Response, endpoint: Endpoint, path: str) -> None:
        status = response.status_code
        if status < 400:
            return
        what = f"{endpoint.host}/{endpoint.repository} answered {status} for {path}"
        if status == 401:
            raise Unauthenticated(
                f"{what}: credentials are missing or wrong; check imagePullSecrets or auth.json", field="auth"
            )
        if status == 403:
            raise PermissionDenied(f"{what}: these credentials may not pull it", field="auth")
        if status == 404:
            raise NotFound(f"image {self._reference} does not exist: {what}", field="image")
        if status == 429 or status >= 500:
            raise Unavailable(f"{what}; try again later")
        raise Internal(f"{what}: {response.read()[:200]!r}")

    def _authorization(self, endpoint: Endpoint, challenge: str) -> str:
        """Answers a 401's challenge: Basic, or a Bearer token from its realm (distribution's token specification)."""
        kind, _, rest = challenge.partition(" ")
        basic = self._basic(endpoint)
        if self._auth.registry_token:
            return f"Bearer {self._auth.registry_token}"
        if kind.lower() == "basic":
            if basic is None:
                raise Unauthenticated(
                    f"registry {endpoint.host} wants a user and password; give imagePullSecrets or an entry in auth.json",
                    field="auth",
                )
            return "Basic " + base64.b64encode(":".join(basic).encode()).decode()
        parameters = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in parameters:
            raise Unauthenticated(
                f"registry {endpoint.host} asks for authentication of a kind crisp does not know: {challenge[:80]!r}",
                field="auth",
            )
        query = {
            "service": parameters.get("service", ""),
            "scope": parameters.get("scope", f"repository:{endpoint.repository}:pull"),
        }
        client = self._clients[endpoint.insecure]
        try:
            if self._auth.identity_token:
                answer = client.post(
                    parameters["realm"],
                    data={
                        **query,
                        "grant_type": "refresh_token",
                        "refresh_token": self._auth.identity_token,
                        "client_id": "crisp",
                    },
                )
            else:
                answer = client.get(parameters["realm"], params=query, auth=basic)
        except httpx.HTTPError as error:
            raise Unavailable(f"the token server of {endpoint.host} is not reachable: {error}") from error
        if answer.status_code in (401, 403):
            raise Unauthenticated(f"the token server of {endpoint.host} refused these credentials", field="auth")
        try:
            document = answer.raise_for_status().json()
            return f"Bearer {document.get('token') or document['access_token']}"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unavailable(
                f"the token server of {endpoint.host} gave no token: HTTP {answer.status_code}"
            ) from error

    def _basic(self, endpoint: Endpoint) -> tuple[str, str] | None:
        if self._auth.username:
            return self._auth.username, self._auth.password
        if self._auth.auth:
            return decode_basic(self._auth.auth, "the request")
        return self._conf.credentials(f"{endpoint.host}/{endpoint.repository}")
