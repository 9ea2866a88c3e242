"""Volumes that kubelet prepares on the host, as a container sees them."""

from cluster import Cluster, shell, then_sleeps
from expect import when


def test_empty_dirs_are_shared_by_containers_and_survive_a_restart(cluster: Cluster) -> None:
    mount = {"volumeMounts": [{"name": "work", "mountPath": "/common"}]}
    spec = {
        "volumes": [{"name": "work", "emptyDir": {}}],
        "containers": [
            shell("test -e /common/restarted && exec sleep 600; touch /common/restarted; exit 1", "writer", **mount),
            then_sleeps(f"{when('/common/restarted')} echo seen", "reader", **mount),
        ],
    }
    with cluster.pod(spec) as name:
        assert cluster.output(name, "reader") == "seen\n"


def test_an_empty_dir_in_memory_is_a_tmpfs_of_its_size(cluster: Cluster) -> None:
    spec = {
        "volumes": [{"name": "work", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}}],
        "containers": [
            then_sleeps("grep ' /common ' /proc/mounts", volumeMounts=[{"name": "work", "mountPath": "/common"}])
        ],
    }
    with cluster.pod(spec) as name:
        device, _, kind, options = cluster.output(name).split()[:4]
        assert (device, kind) == ("tmpfs", "tmpfs")
        assert "size=8192k" in options.split(",")


def test_projected_files_come_with_their_modes_and_change(cluster: Cluster) -> None:
    cluster.put("configmaps", "settings", data={"colour": "red"})
    cluster.put("secrets", "words", stringData={"password": "sesame"})
    sources = [
        {"configMap": {"name": "settings"}},
        {"secret": {"name": "words", "items": [{"key": "password", "path": "secret/password", "mode": 0o400}]}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    environment = [{"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}}]
    spec = {
        "volumes": [{"name": "all", "projected": {"sources": sources}}],
        "containers": [
            shell(
                "exec sleep 600", env=environment, volumeMounts=[{"name": "all", "mountPath": "/all", "readOnly": True}]
            )
        ],
    }
    with cluster.pod(spec, labels={"app": "projected"}) as name:
        cluster.ready(name)
        script = "cat /all/colour; echo; cat /all/secret/password; echo; cat /all/labels; echo; stat -L -c %a /all/secret/password; echo $COLOUR"
        assert cluster.kubectl("exec", name, "--", "sh", "-c", script).split() == [
            "red",
            "sesame",
            'app="projected"',
            "400",
            "red",
        ]
        cluster.kubectl("exec", name, "--", "touch", "/all/x", code=1)
        cluster.put("configmaps", "settings", data={"colour": "blue"})
        # kubelet updates the volume when the pod changes, otherwise within a minute.
        cluster.patch(name, {"metadata": {"annotations": {"look": "now"}}})
        script = "while ! grep -q blue /all/colour; do sleep 0.1; done; cat /all/colour"
        assert cluster.kubectl("exec", name, "--", "sh", "-c", script) == "blue"


def test_sub_paths_of_files_and_folders(cluster: Cluster) -> None:
    cluster.put("configmaps", "page", data={"index.html": "from a map", "other": "unseen"})
    mounts = [
        {"name": "page", "mountPath": "/www/index.html", "subPath": "index.html"},
        {"name": "work", "mountPath": "/part", "subPath": "a/b"},
        {"name": "work", "mountPath": "/mine", "subPathExpr": "$(NAME)"},
        {"name": "work", "mountPath": "/whole"},
    ]
    environment = [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    spec = {
        "volumes": [{"name": "page", "configMap": {"name": "page"}}, {"name": "work", "emptyDir": {}}],
        "containers": [
            then_sleeps(
                "touch /part/file /mine/own; find /whole -type f | sort; cat /www/index.html",
                volumeMounts=mounts,
                env=environment,
            )
        ],
    }
    with cluster.pod(spec) as name:
        assert cluster.output(name).splitlines() == ["/whole/a/b/file", f"/whole/{name}/own", "from a map"]


def test_host_paths_of_each_type_and_their_faults(cluster: Cluster) -> None:
    folder = cluster.kubelet.root / "host"
    folder.mkdir()
    (folder / "file").write_text("of the host")
    volumes = [
        {"name": "file", "hostPath": {"path": f"{folder}/file", "type": "File"}},
        {"name": "made", "hostPath": {"path": f"{folder}/made", "type": "DirectoryOrCreate"}},
    ]
    mounts = [{"name": "file", "mountPath": "/file"}, {"name": "made", "mountPath": "/made"}]
    with cluster.pod(
        {"volumes": volumes, "containers": [then_sleeps("cat /file > /made/copy", volumeMounts=mounts)]}
    ) as name:
        cluster.output(name)
        assert (folder / "made/copy").read_text() == "of the host"
    absent = [{"name": "absent", "hostPath": {"path": f"{folder}/absent", "type": "Directory"}}]
    with cluster.pod(
        {"volumes": absent, "containers": [shell("true", volumeMounts=[{"name": "absent", "mountPath": "/x"}])]}
    ) as name:
        cluster.event(name, "FailedMount", "is not a directory")


def test_an_fs_group_owns_the_volume_and_is_a_group_of_the_process(cluster: Cluster) -> None:
    spec = {
        "securityContext": {"fsGroup": 4321, "runAsUser": 1000, "runAsGroup": 2000, "supplementalGroups": [3000]},
        "volumes": [{"name": "work", "emptyDir": {}}],
        "containers": [
            then_sleeps(
                "stat -c %g /common; id -u; id -G; touch /common/x",
                volumeMounts=[{"name": "work", "mountPath": "/common"}],
            )
        ],
    }
    with cluster.pod(spec) as name:
        owner, user, groups = cluster.output(name).splitlines()
        assert (owner, user) == ("4321", "1000")
        assert set(groups.split()) == {"2000", "3000", "4321"}
