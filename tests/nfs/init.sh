#!/bin/bash
# PID 1 of the test machines: the network, then an NFS server on `server`, what a client needs elsewhere, then agent.py.
# Kernel command line: vm.name=server|one|two vm.ip=10.9.0.N
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
for folder in /dev/shm /run /tmp; do mount -t tmpfs tmp $folder; done
mount -o remount,rw / 2>/dev/null
mkdir -p /run/rpcbind /run/lock /var/lib/nfs/rpc_pipefs
for word in $(cat /proc/cmdline); do
  case $word in vm.name=*) name=${word#vm.name=};; vm.ip=*) address=${word#vm.ip=};; esac
done
hostname "$name"
printf '127.0.0.1 localhost\n10.9.0.1 server\n10.9.0.2 one\n10.9.0.3 two\n' > /etc/hosts
ip link set lo up
modprobe virtio_net
sleep 0.5
for device in /sys/class/net/*; do
  nic=$(basename "$device")
  case $(cat "$device/address") in
    52:54:00:00:01:*) ip link set "$nic" up; ip addr add 10.0.2.15/24 dev "$nic";;  # for orders
    52:54:00:00:02:*) ip link set "$nic" up; ip addr add "$address/24" dev "$nic";;  # for NFS: it can be cut
  esac
done
if [ "$name" = server ]; then
  modprobe virtio_blk ext4
  blkid /dev/vdb >/dev/null 2>&1 || mkfs.ext4 -q /dev/vdb
  mkdir -p /export && mount /dev/vdb /export
  modprobe nfsd
  mount -t nfsd nfsd /proc/fs/nfsd 2>/dev/null
  mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/nfsdcld
  mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs
  echo '/export *(rw,sync,no_root_squash,no_subtree_check,insecure)' > /etc/exports
  rpcbind -w; rpc.statd --no-notify; nfsdcld; exportfs -ra; rpc.nfsd 8; rpc.mountd; sm-notify
else
  modprobe nfs; modprobe nfsv3; modprobe nfsv4
  mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs
  rpcbind -w; rpc.statd
fi
echo "READY $name" > /dev/console
while :; do python3 /agent.py; sleep 0.2; done
