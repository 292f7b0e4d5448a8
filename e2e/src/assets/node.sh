#!/bin/bash
# One node: containerd, kubelet and kube-proxy. It is the first process of its own PID namespace, with its own mounts, so
# that all of it ends with it, and nothing that it mounts or writes under /run and /var is seen elsewhere.
# In the environment: HOME_DIR (the node's directory), KUBE (Kubernetes' programs), NAME, ADDRESS, LABELS.
set -eu

mount --make-rshared /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock /run/node /run/kube
mount --bind "$HOME_DIR" /run/node
mount --bind "$KUBE" /run/kube
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
for directory in kubelet containerd cni; do
    mkdir -p "/var/lib/$directory" "/run/node/lib/$directory"
    mount --bind "/run/node/lib/$directory" "/var/lib/$directory"
done
mkdir -p /var/log/pods /run/node/log/pods
mount --bind /run/node/log/pods /var/log/pods
hostname "$NAME"

# The kubelet sets these for the whole machine: it gets copies.
for setting in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops; do
    copy=/run/${setting##*/}
    cat "/proc/sys/$setting" >"$copy"
    mount --bind "$copy" "/proc/sys/$setting"
done

nft -f /run/node/masquerade.nft

containerd --config /run/node/containerd.toml --log-level warn >>/run/node/log/containerd.log 2>&1 &
until ctr version >/run/node/log/ctr.log 2>&1; do
    kill -0 $! || { echo "containerd has ended"; exit 1; }
    sleep 0.1
done
for image in /run/node/images/*.tar; do
    ctr --namespace k8s.io images import "$image" >>/run/node/log/ctr.log 2>&1
done

/run/kube/kube-proxy --config /run/node/proxy.json >>/run/node/log/kube-proxy.log 2>&1 &
/run/kube/kubelet --config /run/node/kubelet.json --kubeconfig /run/node/kubelet.kubeconfig --root-dir /var/lib/kubelet \
    --node-ip "$ADDRESS" --hostname-override "$NAME" --node-labels "$LABELS" >>/run/node/log/kubelet.log 2>&1 &
wait -n || true
echo "one of containerd, kubelet and kube-proxy has ended"
