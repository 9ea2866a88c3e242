"""Names of images, as they are stored, found and removed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from crisp_proto.image_name import ImageName
from image_svc.images import Images
from image_svc.layers import Layers
from image_svc.manifests import Manifest
from image_svc.registries_conf import RegistriesConf
from image_svc.settings import ImageSettings
from image_svc.store import Store
from servicekit.errors import InvalidArgument, NotFound

DIGESTS = [f"sha256:{letter * 64}" for letter in "abcdef"]
IMAGE, OTHER_IMAGE, INDEX, MANIFEST, *_ = DIGESTS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "image.db")
    yield opened
    opened.close()


@pytest.fixture
def layers(store: Store, tmp_path: Path) -> Iterator[Layers]:
    opened = Layers(store, tmp_path, parallel=1)
    yield opened
    opened.close()


@pytest.fixture
def images(store: Store, layers: Layers, tmp_path: Path) -> Images:
    return Images(store, RegistriesConf(tmp_path / "none.conf", tmp_path / "none.json"), ImageSettings(), layers)


def add(store: Store, *names: str, image: str = IMAGE) -> None:
    assert store.add_image(
        Manifest(MANIFEST, INDEX, image, b"{}", ()), [], [ImageName.from_normal(name) for name in names]
    )


@pytest.mark.parametrize("registry", ["registry.example", "registry.example:5000", "[::1]:5000"])
def test_removing_a_digest_removes_an_image_that_only_the_same_repository_names(store: Store, registry: str) -> None:
    add(store, f"{registry}/busybox@{INDEX}", f"{registry}/busybox@{MANIFEST}")
    store.remove_name(ImageName.from_normal(f"{registry}/busybox@{INDEX}"))
    assert store.images() == []


def test_removing_a_digest_keeps_an_image_with_a_tag_or_another_repositorys_digest(store: Store) -> None:
    add(store, f"a.example:5000/x@{MANIFEST}", f"a.example:5000/y@{MANIFEST}", f"a.example:5000/y@{INDEX}")
    store.remove_name(ImageName.from_normal(f"a.example:5000/x@{MANIFEST}"))
    assert len(store.images()) == 1
    add(store, "a.example:5000/x:1")
    store.remove_name(ImageName.from_normal(f"a.example:5000/y@{MANIFEST}"))
    assert len(store.images()) == 1


def test_the_last_tag_takes_the_image_with_it_whatever_digests_are_left(store: Store) -> None:
    add(store, "a.example:5000/x:1", "b.example/x:2", f"b.example/x@{MANIFEST}")
    store.remove_name(ImageName.from_normal("a.example:5000/x:1"))
    assert [str(name) for name in store.images()[0].names] == ["b.example/x:2", f"b.example/x@{MANIFEST}"]
    store.remove_name(ImageName.from_normal("b.example/x:2"))
    assert store.images() == []


def test_a_name_with_tag_and_digest_is_found_by_its_digest(store: Store) -> None:
    add(store, f"a.example:5000/x@{MANIFEST}")
    found = store.image_by_name(ImageName.from_normal(f"a.example:5000/x:any@{MANIFEST}"))
    assert found is not None
    assert found.id == IMAGE


def test_images_are_found_by_name_by_id_and_by_the_beginning_of_one(store: Store, images: Images) -> None:
    add(store, "docker.io/library/busybox:latest", f"docker.io/library/busybox@{MANIFEST}")
    for text in ("busybox", f"busybox@{MANIFEST}", IMAGE, "a" * 64, "aaa"):
        assert images.get(text).id == IMAGE
    shown = images.get("aaa")
    assert (shown.repo_tags, shown.repo_digests) == (
        ["docker.io/library/busybox:latest"],
        [f"docker.io/library/busybox@{MANIFEST}"],
    )
    for absent in ("other", OTHER_IMAGE, "bbb"):
        with pytest.raises(NotFound, match="; pull it first"):
            images.get(absent)
    add(store, image="sha256:aaab" + "0" * 60)
    with pytest.raises(InvalidArgument, match="the beginning of several images' ids; give more of it"):
        images.get("aaa")


async def test_a_name_that_looks_like_the_beginning_of_an_id_is_removed_as_a_name(store: Store, images: Images) -> None:
    add(store, "docker.io/library/cafe:latest", "docker.io/library/cafe:2")
    await images.remove("cafe")
    assert images.get(IMAGE).repo_tags == ["docker.io/library/cafe:2"]
    await images.remove("aaa")
    assert images.all() == []
