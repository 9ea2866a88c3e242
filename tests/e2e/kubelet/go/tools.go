//go:build tools

// Package kubelet names what `make kubelet` builds: kubelet and kubectl, and for a client's whole way an API server and its etcd.
package kubelet

import (
	_ "go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
