"""A registry, spoken to by the OCI distribution API (distribution-spec 1.1).

Everything here blocks and runs in threads: a layer's bytes go from the socket to the inflater
without a queue in between.
"""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager

from crisp_proto.image import PullRequest
from crisp_proto.image_name import ImageName
from image_svc.manifests import INDEX_TYPES, MANIFEST_TYPES, Descriptor
from image_svc.registries_conf import Endpoint, RegistriesConf, decode_basic
from servicekit.errors import CrispError, Internal, NotFound, PermissionDenied, Unauthenticated, Unavailable
from servicekit.imports import hidden

with hidden("rich"):
    import httpx

_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_MANIFEST_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_PIECE = 1 << 18


class Repository:
    """A repository, at the first of its endpoints that has the manifest."""

    def __init__(self, name: ImageName, conf: RegistriesConf, auth: PullRequest, timeout: float) -> None:
        self._name = name
        self._endpoints = conf.endpoints(name)
        self._conf = conf
        self._auth = auth
        self._authorizations: dict[str, str] = {}
        self._chosen: Endpoint | None = None
        self._clients = {
            insecure: httpx.Client(
                timeout=httpx.Timeout(timeout, connect=min(timeout, 10)), verify=not insecure, follow_redirects=True
            )
            for insecure in {endpoint.insecure for endpoint in self._endpoints}
        }
        self._schemes: dict[str, str] = {}

    def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            client.close()

    def manifest(self, reference: str) -> bytes:
        """Returns the manifest or index for a tag or digest, from the first endpoint that has it.

        Raises what the last endpoint raised: NotFound, Unauthenticated, PermissionDenied,
        Unavailable, Internal.
        """
        last: CrispError | None = None
        for endpoint in [self._chosen] if self._chosen else self._endpoints:
            try:
                with self._get(endpoint, f"manifests/{reference}", accept=_MANIFEST_ACCEPT) as response:
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
        """Yields the bytes of a blob as the registry sends them. Raises as `manifest` does."""
        assert self._chosen is not None
        with self._get(self._chosen, f"blobs/{descriptor.digest}") as response:
            yield self._pieces(response, descriptor)

    def _pieces(self, response: httpx.Response, descriptor: Descriptor) -> Iterator[bytes]:
        try:
            yield from response.iter_raw(_PIECE)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{self._name}: the registry broke off in the middle of {descriptor.digest}: {error}", hint="pull again"
            ) from error

    @contextmanager
    def _get(self, endpoint: Endpoint, path: str, accept: str = "*/*") -> Iterator[httpx.Response]:
        """Sends a request, a second time with an authorization if the registry asks for one."""
        url = f"{endpoint.api_host}/v2/{endpoint.repository}/{path}"
        headers = {"accept": accept, "accept-encoding": "identity"}
        for attempt in (1, 2):
            authorization = self._authorizations.get(endpoint.host)
            if authorization:
                headers["authorization"] = authorization
            with self._send(endpoint, url, headers) as response:
                if response.status_code == 401 and attempt == 1:
                    challenge = response.headers.get("www-authenticate", "")
                    self._authorizations[endpoint.host] = self._authorize(endpoint, challenge)
                    continue
                self._raise_for(response, endpoint, path)
                yield response
                return

    @contextmanager
    def _send(self, endpoint: Endpoint, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Sends a request by https; by http if that fails and the endpoint is insecure."""
        client = self._clients[endpoint.insecure]
        error: httpx.HTTPError | None = None
        for scheme in self._schemes_of(endpoint):
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
            f"registry {endpoint.host} is not reachable for {self._name}: {error}",
            hint="check its name, the network, and whether it needs insecure = true in registries.conf",
        ) from error

    def _schemes_of(self, endpoint: Endpoint) -> list[str]:
        known = self._schemes.get(endpoint.host)
        if known is not None:
            return [known]
        return ["https", "http"] if endpoint.insecure else ["https"]

    def _raise_for(self, response: httpx.Response, endpoint: Endpoint, path: str) -> None:
        status = response.status_code
        if status < 400:
            return
        what = f"{endpoint.host}/{endpoint.repository} answered {status} for {path}"
        if status == 401:
            raise Unauthenticated(
                f"{what}: credentials are missing or wrong", hint="check imagePullSecrets or auth.json", field="auth"
            )
        if status == 403:
            raise PermissionDenied(f"{what}: these credentials may not pull it", field="auth")
        if status == 404:
            raise NotFound(f"image {self._name} does not exist: {what}", field="image")
        if status == 429 or status >= 500:
            raise Unavailable(what, hint="try again later")
        raise Internal(f"{what}: {response.read()[:200]!r}")

    def _authorize(self, endpoint: Endpoint, challenge: str) -> str:
        """Returns the Authorization header that a 401's challenge asks for."""
        basic = self._basic(endpoint)
        if self._auth.registry_token:
            return f"Bearer {self._auth.registry_token}"
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            if basic is None:
                raise Unauthenticated(
                    f"registry {endpoint.host} wants a user and password",
                    hint="give imagePullSecrets or an entry in auth.json",
                    field="auth",
                )
            return "Basic " + base64.b64encode(":".join(basic).encode()).decode()
        parameters = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in parameters:
            raise Unauthenticated(
                f"registry {endpoint.host} asks for authentication of a kind crisp does not know: {challenge[:80]!r}",
                field="auth",
            )
        return f"Bearer {self._bearer_token(endpoint, parameters, basic)}"

    def _bearer_token(self, endpoint: Endpoint, challenge: dict[str, str], basic: tuple[str, str] | None) -> str:
        """Asks the token server of the challenge's realm (distribution's token specification)."""
        realm = challenge["realm"]
        query = {
            "service": challenge.get("service", ""),
            "scope": challenge.get("scope", f"repository:{endpoint.repository}:pull"),
        }
        identity = self._auth.identity_token
        refresh = {"grant_type": "refresh_token", "refresh_token": identity, "client_id": "crisp"}
        client = self._clients[endpoint.insecure]
        try:
            answer = (
                client.post(realm, data={**query, **refresh})
                if identity
                else client.get(realm, params=query, auth=basic)
            )
        except httpx.HTTPError as error:
            raise Unavailable(f"the token server of {endpoint.host} is not reachable: {error}") from error
        if answer.status_code in (401, 403):
            raise Unauthenticated(f"the token server of {endpoint.host} refused these credentials", field="auth")
        try:
            document = answer.raise_for_status().json()
            return str(document.get("token") or document["access_token"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unavailable(
                f"the token server of {endpoint.host} gave no token: HTTP {answer.status_code}"
            ) from error

    def _basic(self, endpoint: Endpoint) -> tuple[str, str] | None:
        """Returns user and password: the request's own, else those of auth.json."""
        if self._auth.username:
            return self._auth.username, self._auth.password
        if self._auth.auth:
            return decode_basic(self._auth.auth, "the request")
        return self._conf.credentials(f"{endpoint.host}/{endpoint.repository}")
