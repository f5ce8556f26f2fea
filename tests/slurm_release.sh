#!/usr/bin/env bash
# Run a command beside another release of Slurm: in a root folder of the Debian release that carries it.
#
#   tests/slurm_release.sh 24.11 .venv/bin/python -m pytest -m slurm       (make test SLURM=24.11)
#   tests/slurm_release.sh 26.05                                           (make the root folder, and no more)
#
# The root folder is made once, from the mirror that this machine's apt uses, in $SLURM_ROOTS (else ~/.cache/forge-hpc/slurm;
# 2 to 3 minutes, 0.6 GB), and never changed by what runs in it: writes go to memory, over it, and end with the command. So do
# its processes, mounts, links and names: network, hostname, mounts and processes are the command's own. The project, its
# environment with the Python behind it, and /tmp are seen at their places.
set -euo pipefail
packages=slurm-wlm,munge,iproute2,bubblewrap,procps,hostname,python3,python3-venv,gcc,libc6-dev,libgomp1

fail() { # MESSAGE HINT
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

# The machine's own mirror of Debian, by the words of apt.
mirror() {
  [[ -z ${SLURM_MIRROR:-} ]] || { echo "$SLURM_MIRROR" && return; }
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 2>/dev/null | head -1
}

make_root() { # DEBIAN-RELEASE FOLDER
  local root=$2 from script=() half
  from=$(mirror) || true
  if [[ -z $from ]]; then # apt's lists are not here
    apt-get update -qq || true
    from=$(mirror) || true
  fi
  [[ -n $from ]] || fail "this machine's apt knows no mirror of Debian" "SLURM_MIRROR=URL of one"
  if ! command -v debootstrap >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq; apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; } ||
      fail "debootstrap is needed to make $root" "apt-get install debootstrap"
  fi
  # An older debootstrap does not know the names of later releases; all of them are made like sid.
  [[ -e /usr/share/debootstrap/scripts/$1 ]] || script=(/usr/share/debootstrap/scripts/sid)
  echo "Making $root: Debian $1 with its Slurm (once) ..." >&2
  half=$(mktemp -d "$root.XXXXXX") # beside it, then renamed: a root that is there is whole
  chmod 755 "$half"
  # What it mounts ends with it, also where it is killed.
  if ! unshare --mount debootstrap --variant=minbase --include="$packages" \
    "$1" "$half" "$from" "${script[@]}" >"$root.log" 2>&1; then
    rm -rf --one-file-system "$half"
    fail "debootstrap failed: $(tail -n 1 "$root.log")" "see $root.log"
  fi
  rm -rf "$half"/var/cache/apt/archives/*.deb "$half"/var/lib/apt/lists/*
  mv "$half" "$root"
}

# What the command is to find at its place: the project, the Python behind its environment, and what $BIND names.
places() {
  pwd
  [[ -z ${BIND:-} ]] || echo "$BIND"
  [[ ! -x .venv/bin/python ]] || .venv/bin/python -c '
import sys, sysconfig
from pathlib import Path
print(Path(sys.prefix).resolve())
if sys.base_prefix == "/usr":  # Debian'"'"'s own: the root has another one
    print(Path(sys._base_executable).resolve(), sysconfig.get_path("stdlib"), sep="\n")
else:
    print(sys.base_prefix)'
}

inside() { # ROOT TOP COMMAND...: in the namespaces; this shell is their init, which reaps what the command leaves
  local root=$1 top=$2 place how
  shift 2
  mount --make-rprivate /
  ip link set lo up
  hostname slurm-test
  mount -t tmpfs -o mode=755 tmpfs "$top"
  mkdir "$top"/{upper,work,root}
  mount -t overlay -o "lowerdir=$root,upperdir=$top/upper,workdir=$top/work" overlay "$top/root" ||
    fail "$root cannot be mounted with writes to memory over it" "a kernel with overlayfs, and SLURM_ROOTS on a disk of this host"
  for place in /dev /sys /tmp $PLACES; do
    if [[ -d $place ]]; then mkdir -p "$top/root$place"; else touch "$top/root$place"; fi
    case $place in /dev | /sys) how=--rbind ;; *) how=--bind ;; esac
    mount "$how" "$place" "$top/root$place"
  done
  mount -t proc proc "$top/root/proc"
  mount -t tmpfs -o mode=755 tmpfs "$top/root/run"
  mkdir -p "$top/root/run/lock" "$top/root/.old"
  echo "127.0.0.1 localhost slurm-test" >"$top/root/etc/hosts"
  cd "$top/root"
  pivot_root . .old # not chroot: what is chrooted may make no user namespaces
  umount -l /.old
  cd "$PROJECT"
  trap : INT TERM
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" || exit
}

main() { # a function: bash reads a script while it runs, and this one may be edited meanwhile
  local debian roots root version top
  case ${1:-} in # Slurm's release, and Debian's that carries it
  22.05) debian=bookworm ;;
  24.11) debian=trixie ;;
  26.05) debian=forky ;;
  *) fail "no Slurm ${1:-}: there are 22.05, 24.11 and 26.05" "make test SLURM=24.11" ;;
  esac
  [[ $(id -u) == 0 ]] || fail "a root folder and its namespaces need root" "run it as root, in a container or a virtual machine"
  roots=${SLURM_ROOTS:-${XDG_CACHE_HOME:-$HOME/.cache}/forge-hpc/slurm}
  mkdir -p "$roots"
  root=$(realpath "$roots")/$debian
  exec 9>"$root.lock"
  flock 9 # another may be making it
  if [[ ! -d $root ]]; then
    rm -rf --one-file-system "$root".?????? # what was cut off
    make_root "$debian" "$root"
  fi
  exec 9>&-
  version=$(dpkg-query --admindir="$root/var/lib/dpkg" -W -f='${Version}' slurm-wlm)
  [[ $version == "$1"* ]] || fail "Debian $debian carries Slurm $version, not $1" "remove $root if it is old"
  shift
  (($#)) || return 0

  unshare --net --uts --ipc --mount --pid --fork true ||
    fail "root may make no namespaces here" "a virtual machine, or a privileged container"
  top=$(mktemp -d)
  trap "rmdir '$top'" EXIT
  trap : INT TERM # as inside: the command ends in good order
  PROJECT=$PWD PLACES=$(places) \
    unshare --net --uts --ipc --mount --pid --fork --kill-child "tests/$(basename "$0")" --inside "$root" "$top" "$@"
}

if [[ ${1:-} == --inside ]]; then
  shift
  inside "$@"
else
  cd "$(dirname "$0")/.."
  main "$@"
fi
exit
