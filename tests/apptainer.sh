#!/usr/bin/env bash
# Run a command where Apptainer and Slurm are: in a root folder of a Debian release that carries both (sid; bookworm and
# trixie have no Apptainer).
#
#   tests/apptainer.sh .venv/bin/python -m pytest tests/test_sandbox_apptainer.py tests/test_containers_apptainer.py
#                                                                                             (make test-apptainer)
#
# The folder is made once, with an image in both forms (/opt/python, /opt/python.sif), from the mirror that this machine's
# apt uses, in $APPTAINER_ROOT (else ~/.cache/forge-hpc/apptainer; 4 minutes, 1 GB). The command has a network, mounts and
# processes of its own, which end with it; the project, its environment and the Python behind it are seen.
set -euo pipefail
packages=apptainer,squashfuse,bubblewrap,python3,procps,iproute2,hostname,slurm-wlm,munge,libnuma1

fail() { # MESSAGE HINT
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

make_root() { # FOLDER
  local root=$1 from half
  from=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 2>/dev/null | head -1)
  [[ -n $from ]] || fail "this machine's apt knows no mirror of Debian" "name one in /etc/apt/sources.list"
  command -v debootstrap >/dev/null || fail "debootstrap is needed to make $root" "apt-get install debootstrap"
  echo "Making $root: Debian sid with Apptainer (once) ..." >&2
  half=$(mktemp -d "$root.XXXXXX") # beside it, then renamed: a root that is there is whole
  chmod 755 "$half"
  if ! debootstrap --variant=minbase --include="$packages" sid "$half" "$from" /usr/share/debootstrap/scripts/sid \
    >"$root.log" 2>&1; then
    rm -rf --one-file-system "$half"
    fail "debootstrap failed: $(tail -n 1 "$root.log")" "see $root.log"
  fi
  rm -rf "$half"/var/cache/apt/archives/*.deb "$half"/var/lib/apt/lists/*
  mkdir -p "$half"/opt/python/{dev,home,proc,root,run,sandbox,sys,tmp,var/tmp}
  tar -C "$half" -c --exclude='usr/*/apptainer' --exclude='usr/share/[dlm]*' bin etc lib lib64 sbin usr |
    tar -C "$half/opt/python" -x
  within "$half" apptainer build /opt/python.sif /opt/python >>"$root.log" 2>&1 ||
    fail "no image could be built" "see $root.log"
  mv "$half" "$root"
}

within() { # ROOT COMMAND...
  PROJECT=$PWD unshare --net --uts --ipc --mount --pid --fork --kill-child "$(realpath "$0")" --inside "$@"
}

# What the command is to find at its place: the project, its environment, and the Python behind that.
places() {
  echo "$PROJECT"
  [[ ! -x .venv/bin/python ]] || .venv/bin/python -c '
import sys
from pathlib import Path
print(Path(sys.prefix).resolve(), sys.base_prefix, sep="\n")'
}

inside() { # ROOT COMMAND...: in the namespaces
  local root=$1 place
  shift
  mount --make-rprivate /
  ip link set lo up
  hostname slurm-test
  mount --bind "$root" "$root"
  for place in /dev /sys; do mount --rbind "$place" "$root$place"; done
  for place in /run /tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root$place"; done
  mount -t proc proc "$root/proc"
  mknod -m 666 "$root/run/fuse" c 10 229 # as udev makes it; this machine's may be root's alone
  [[ ! -e /dev/fuse ]] || mount --bind "$root/run/fuse" "$root/dev/fuse"
  for place in $(places); do
    [[ $place == /usr ]] || { mkdir -p "$root$place" && mount --bind "$place" "$root$place"; }
  done
  mkdir -p "$root/run/.old"
  echo "127.0.0.1 localhost slurm-test" >"$root/etc/hosts"
  mkdir -p "$root/run/lock"
  cd "$root"
  pivot_root . run/.old # not chroot: what is chrooted may make no user namespaces
  umount -l /run/.old
  cd "$PROJECT"
  HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" || exit
}

if [[ ${1:-} == --inside ]]; then
  shift
  inside "$@"
  exit
fi

cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || fail "a root folder and its namespaces need root" "run it as root, in a container or a virtual machine"
root=${APPTAINER_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/forge-hpc/apptainer}
mkdir -p "$(dirname "$root")"
exec 9>"$root.lock"
flock 9 # another may be making it
if [[ ! -x $root/usr/sbin/slurmctld ]]; then # not there, or of an older script
  rm -rf --one-file-system "$root"
  rm -rf --one-file-system "$root".?????? # what was cut off
  make_root "$root"
fi
exec 9>&-
(($#)) || exit 0
within "$(realpath "$root")" "$@"
