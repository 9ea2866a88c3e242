"""Images are pulled from a real registry, listed, loaded and removed; faulty ones are refused."""

import base64
import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import bcrypt
import grpc
import httpx
import pytest
from expect import error_of
from traces import client_of, get
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images, registry
from crisplab.cri import Cri, container_config, pod_config
from crisplab.images import Image
from crisplab.node import Node
from crisplab.registry import free_port

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


def small(text: str) -> Image:
    """Returns an image with one file."""
    layer = images.Layer()
    layer.file("/text", text)
    return images.build([layer.finish()], {"Cmd": ["/text"], "User": "1002"})


@pytest.fixture
def names(cri_client: Cri) -> Iterator[list[str]]:
    """A list of references that are removed after the test."""
    used: list[str] = []
    yield used
    for name in used:
        cri_client.remove_image(name)


def image_of(client: Cri, name: str) -> cri.Image | None:
    """Returns the image that ImageStatus has for a name."""
    response = client.image.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=name)), timeout=20)
    return response.image if response.HasField("image") else None


def test_pull_status_list_and_remove(cri_client: Cri, world: World, names: list[str]) -> None:
    image = small("pull")
    image.push(world.registry, "test/pull", "1", "2")
    one, two = f"{world.registry}/test/pull:1", f"{world.registry}/test/pull:2"
    names += [one, two]
    assert image_of(cri_client, one) is None
    assert cri_client.pull(one) == image.id
    assert cri_client.pull(two) == image.id
    by_digest = f"{world.registry}/test/pull@{image.digest}"
    for name in (one, two, by_digest, image.id, image.id.removeprefix("sha256:")[:12]):
        found = image_of(cri_client, name)
        assert found is not None, name
        assert found.id == image.id
        assert sorted(found.repo_tags) == [one, two]
        assert list(found.repo_digests) == [by_digest]
        assert found.uid.value == 1002
        assert found.size > 0
    assert image.id in {entry.id for entry in cri_client.images()}
    cri_client.remove_image(one)
    assert image_of(cri_client, one) is None
    assert image_of(cri_client, two) is not None
    cri_client.remove_image(image.id)
    assert image_of(cri_client, two) is None


def test_an_image_is_removed_by_the_digest_that_it_was_pulled_by(cri_client: Cri, world: World) -> None:
    """An index gives the image two digests in the same repository, of a registry with a port."""
    image = small("index")
    image.push(world.registry, "test/index")
    entry = {"mediaType": MANIFEST_TYPE, "digest": image.digest, "size": len(image.manifest)}
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}).encode()
    digest = f"sha256:{hashlib.sha256(index).hexdigest()}"
    httpx.put(
        f"http://{world.registry}/v2/test/index/manifests/{digest}", content=index, headers={"content-type": INDEX_TYPE}
    ).raise_for_status()
    name = f"{world.registry}/test/index@{digest}"
    assert cri_client.pull(name) == image.id
    found = image_of(cri_client, name)
    assert found is not None
    assert sorted(found.repo_digests) == sorted([name, f"{world.registry}/test/index@{image.digest}"])
    cri_client.remove_image(name)
    assert image_of(cri_client, image.id) is None
    assert image.id not in {entry.id for entry in cri_client.images()}


def test_a_tag_that_moved_leaves_the_old_image_without_it(cri_client: Cri, world: World, names: list[str]) -> None:
    old, new = small("old"), small("new")
    name = f"{world.registry}/test/moving:1"
    old.push(world.registry, "test/moving", "1")
    cri_client.pull(name)
    new.push(world.registry, "test/moving", "1")
    assert cri_client.pull(name) == new.id
    names += [old.id, new.id]
    before, after = image_of(cri_client, old.id), image_of(cri_client, new.id)
    assert before is not None
    assert after is not None
    assert (list(before.repo_tags), list(after.repo_tags)) == ([], [name])


def test_an_image_in_use_keeps_its_layers_until_the_container_goes(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    layer = images.busybox_layer()
    layer.file("/mark", "still here\n")
    images.build([layer.finish()], {"Cmd": ["sh"]}).push(world.registry, "test/used", "1")
    name = f"{world.registry}/test/used:1"
    cri_client.pull(name)
    layers = node.root / "state/image-svc/layers"
    before = set(layers.iterdir())
    config = pod_config("user", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(name, ["sleep", "600"]), config)
        cri_client.remove_image(name)
        assert image_of(cri_client, name) is None
        assert cri_client.exec(container, "cat", "/mark").stdout == b"still here\n"
        assert set(layers.iterdir()) == before
        cri_client.remove(container)
        assert len(set(layers.iterdir())) == len(before) - 1


def test_an_absent_image_and_an_absent_registry(cri_client: Cri, world: World) -> None:
    code, message = error_of(lambda: cri_client.pull(f"{world.registry}/test/nothing:1"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "test/nothing:1" in message
    dead = free_port()
    code, message = error_of(lambda: cri_client.pull(f"127.0.0.1:{dead}/x:1"))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert f"127.0.0.1:{dead}" in message
    code, message = error_of(lambda: cri_client.pull("UPPER/Case:1"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "UPPER/Case" in message


def test_creating_a_container_from_an_absent_image_leaves_nothing(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    config = pod_config("imageless", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        code, message = error_of(
            lambda: cri_client.create(pod, container_config(f"{world.registry}/test/nothing:1"), config)
        )
        assert code == grpc.StatusCode.NOT_FOUND
        assert "pull it first" in message
        assert cri_client.containers() == []


def test_damaged_blobs_are_refused_and_nothing_of_them_is_kept(cri_client: Cri, node: Node, world: World) -> None:
    """The registry's files are changed: once a layer's bytes, once what a layer inflates to."""
    storage = world.folder / "registry/data/docker/registry/v2/blobs/sha256"
    layer = images.Layer()
    layer.file("/x", b"x" * 5000)
    raw = layer.finish()

    changed = images.build([raw], {"Cmd": ["/x"], "Labels": {"case": "bytes"}}, level=1)
    changed.push(world.registry, "test/damaged", "bytes")
    digest = json.loads(changed.manifest)["layers"][0]["digest"].removeprefix("sha256:")
    blob = storage / digest[:2] / digest / "data"
    blob.write_bytes(
        gzip.compress(raw.replace(b"xxxx", b"yyyy", 1), 1, mtime=0).ljust(blob.stat().st_size, b"\0")[
            : blob.stat().st_size
        ]
    )

    lying = images.build([raw], {"Cmd": ["/x"], "Labels": {"case": "diff"}})
    document = json.loads(next(blob for digest, blob in lying.blobs.items() if digest == lying.id))
    document["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    config = json.dumps(document).encode()
    manifest = json.loads(lying.manifest)
    manifest["config"] |= {"digest": f"sha256:{hashlib.sha256(config).hexdigest()}", "size": len(config)}
    Image(json.dumps(manifest).encode(), {**lying.blobs, manifest["config"]["digest"]: config}).push(
        world.registry, "test/damaged", "diff"
    )

    layers = node.root / "state/image-svc/layers"
    before = sorted(path.name for path in layers.iterdir())
    for tag, said in (("bytes", "layer sha256:"), ("diff", "the image is damaged")):
        code, message = error_of(partial(cri_client.pull, f"{world.registry}/test/damaged:{tag}"))
        assert code == grpc.StatusCode.FAILED_PRECONDITION, message
        assert said in message
        assert image_of(cri_client, f"{world.registry}/test/damaged:{tag}") is None
    assert sorted(path.name for path in layers.iterdir()) == before
    assert list((node.root / "state/image-svc/scratch").iterdir()) == []


def test_a_pull_by_a_digest_that_is_another_images_is_refused(cri_client: Cri, world: World) -> None:
    small("digest").push(world.registry, "test/digest", "1")
    code, message = error_of(lambda: cri_client.pull(f"{world.registry}/test/digest@sha256:{'1' * 64}"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "1" * 64 in message


def test_another_manifest_than_the_digest_names_is_refused(cri_client: Cri, node: Node, world: World) -> None:
    """The registry answers with the manifest of another image, which is valid by itself."""
    wanted, other = small("wanted"), small("other")
    for image in (wanted, other):
        image.push(world.registry, "test/swapped", "1")
    digest = wanted.digest.removeprefix("sha256:")
    blobs = world.folder / "registry/data/docker/registry/v2/blobs/sha256"
    (blobs / digest[:2] / digest / "data").write_bytes(other.manifest)
    before = sorted(path.name for path in (node.root / "state/image-svc/layers").iterdir())
    name = f"{world.registry}/test/swapped@{wanted.digest}"
    code, message = error_of(lambda: cri_client.pull(name))
    assert code == grpc.StatusCode.FAILED_PRECONDITION, message
    assert f"manifest {wanted.digest} has digest {other.digest}" in message
    assert image_of(cri_client, name) is None
    assert image_of(cri_client, other.id) is None
    assert sorted(path.name for path in (node.root / "state/image-svc/layers").iterdir()) == before


def test_a_registry_with_a_password(cri_client: Cri, world: World, tmp_path: Path, names: list[str]) -> None:
    htpasswd = f"kubelet:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n"
    image = small("secret")
    with registry.running(tmp_path / "private", auth=htpasswd) as address:
        image.push(address, "private/image", "1", auth=("kubelet", "secret"))
        name = f"{address}/private/image:1"
        names.append(name)
        code, message = error_of(lambda: cri_client.pull(name))
        assert code == grpc.StatusCode.UNAUTHENTICATED
        assert "imagePullSecrets" in message
        code, message = error_of(lambda: cri_client.pull(name, cri.AuthConfig(username="kubelet", password="wrong")))
        assert code == grpc.StatusCode.UNAUTHENTICATED
        assert "wrong" not in message.replace("credentials are missing or wrong", "")
        encoded = base64.b64encode(b"kubelet:secret").decode()
        assert cri_client.pull(name, cri.AuthConfig(auth=encoded)) == image.id
        assert cri_client.pull(name, cri.AuthConfig(username="kubelet", password="secret")) == image.id


def test_mirrors_and_blocked_prefixes_of_registries_conf(own_node: Node, world: World) -> None:
    image = small("mirror")
    image.push(world.registry, "mirrored/app", "1")
    own_node.root.mkdir(parents=True)
    (own_node.root / "registries.conf").write_text(
        f"""[[registry]]
prefix = "registry.invalid"
[[registry.mirror]]
location = "{world.registry}/mirrored"
insecure = true
[[registry]]
prefix = "registry.invalid/blocked"
blocked = true
"""
    )
    own_node.start()
    with Cri(own_node.socket) as client:
        assert client.pull("registry.invalid/app:1") == image.id
        (listed,) = client.images()
        assert list(listed.repo_tags) == ["registry.invalid/app:1"]
        code, message = error_of(lambda: client.pull("registry.invalid/blocked/app:1"))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "registries.conf" in message


def test_images_load_from_a_layout_and_from_an_archive(
    cri_client: Cri, node: Node, tmp_path: Path, names: list[str]
) -> None:
    first, second = small("layout"), small("archive")
    first.write_layout(tmp_path / "layout", "example.invalid/layout:1")
    second.write_layout(tmp_path / "unpacked", "example.invalid/archive:1")
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        archive.add(tmp_path / "unpacked", ".")
    names += ["example.invalid/layout:1", "example.invalid/archive:1"]
    with client_of(node, "image-svc") as client:
        for path, image in ((tmp_path / "layout", first), (tmp_path / "archive.tar", second)):
            answer = client.post("/v1/loads", json={"path": str(path)}).raise_for_status().json()
            assert [entry["id"] for entry in answer["images"]] == [image.id]
        problem = client.post("/v1/loads", json={"path": str(tmp_path / "nothing")})
        assert problem.status_code == 400
        assert problem.headers["content-type"] == "application/problem+json"
        assert problem.json()["field"] == "path"
    assert image_of(cri_client, "example.invalid/layout:1") is not None
    assert image_of(cri_client, "example.invalid/archive:1") is not None


def test_every_service_has_health_metrics_and_documentation(node: Node) -> None:
    for service in ("image-svc", "runtime-svc", "net-svc", "monitor-svc", "cri-gateway"):
        assert get(node, service, "/healthz").json() == {"status": "ok"}
        assert get(node, service, "/readyz").json() == {"status": "ok"}
        assert "crisp_request_seconds" in get(node, service, "/metrics").text
        assert "openapi" in get(node, service, "/docs").text
        assert get(node, service, "/openapi.json").json()["info"]["title"] == service
