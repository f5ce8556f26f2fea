#!/bin/bash
# On a node: the environment on its own disk.
#   start.sh look ROOT NAME...
#       delete what is old, and say which of them are not there
#   start.sh run ROOT FOLDER SUFFIX ENV CODE PYTHON ARGUMENTS...
#       unpack FOLDER/ENV.SUFFIX and FOLDER/CODE.tar into ROOT unless they are there, and run Python from there; where
#       that cannot be done, PYTHON as it was given. What was broadcast, ROOT/.NAME.JOB.*, is taken in place of FOLDER.
# A NAME that is there holds: BOOT, in which boot of the node it was unpacked (a crash may have left files empty), and
# the files and bytes that SIZE says (those who tidy /tmp may have taken some). ROOT is its user's alone.
set -u -o pipefail
umask 077
UNUSED_DAYS=7
boot=$(cat /proc/sys/kernel/random/boot_id)

say() { echo "warning: $(uname -n): $*" >&2; }

own() { # ROOT is a folder of this user's alone: code is loaded from it
  mkdir -m 700 "$root" 2> /dev/null
  [[ -d $root && ! -L $root && -O $root && $(stat -c %a "$root") == 700 ]]
}

measure() {
  find "$1" -type f ! -name '*.pyc' ! -path "$1/SIZE" ! -path "$1/BOOT" ! -path "$1/venv/pyvenv.cfg*" -printf '%s\n' |
    awk '{ n++; s += $1 } END { printf "%d %.0f\n", n, s }'
}

is_whole() {
  [[ -f $root/$1/BOOT && $(< "$root/$1/BOOT") == "$boot" ]] && [[ $(measure "$root/$1") == "$(< "$root/$1/SIZE")" ]]
}

tidy() { # what no start has used for days, and no run uses
  local old name
  find "$root" -mindepth 1 -maxdepth 1 -mtime "+$UNUSED_DAYS" ! -name '*.lock' -print0 | while IFS= read -r -d '' old; do
    name=${old##*/}
    [[ $name == .* ]] && rm -rf "$old" || (flock -n 8 && rm -rf "$old") 8>> "$root/$name.lock"
  done
}

unpack() { # NAME ARCHIVE: into ROOT/NAME; its lock is held, shared, for as long as this process lives
  local name=$1 archive=$2 sent new lock
  exec {lock}>> "$root/$name.lock"
  flock -s -w 900 "$lock" || { say "$root/$name.lock is held"; return 1; }
  sent=$(compgen -G "$root/.$name.${SLURM_JOB_ID:-0}.*" | head -n 1)
  if ! is_whole "$name"; then
    flock -x -w 900 "$lock" || { say "$root/$name is in use, and not whole"; return 1; }
    if ! is_whole "$name"; then
      rm -rf "$root/$name" "$root/.$name".new.*
      new=$root/.$name.new.$$
      mkdir "$new" && { [[ -n $sent ]] && extract "$sent" "$new" || extract "$archive" "$new"; } || {
        rm -rf "$new" ${sent:+"$sent"}
        return 1
      }
      if [[ -f $new/venv/pyvenv.cfg.in ]]; then
        sed "s|@HERE@|$root/$name|" "$new/venv/pyvenv.cfg.in" > "$new/venv/pyvenv.cfg"
      fi
      echo "$boot" > "$new/BOOT"
      mv "$new" "$root/$name"
    fi
    flock -s "$lock"
  fi
  [[ -z $sent ]] || rm -f "$sent"
  touch "$root/$name"
}

extract() { # ARCHIVE FOLDER
  local why
  case $1 in
    *.zst) why=$( { zstd -q -d -c -T0 "$1" | tar -x -f - -C "$2" --no-same-owner; } 2>&1) ;;
    *) why=$(tar -x -f "$1" -C "$2" --no-same-owner 2>&1) ;;
  esac || {
    why=$(grep -m 1 -i -e 'no space' -e quota <<< "$why" || head -n 1 <<< "$why")
    say "$1 cannot be unpacked into $root: $why"
    return 1
  }
}

what=$1 root=$2
shift 2
if [[ $what == look ]]; then
  own || exit 0 # start.sh run says so
  tidy
  for name in "$@"; do is_whole "$name" || echo lacks "$name"; done
  exit 0
fi
folder=$1 suffix=$2 env=$3 code=$4 python=$5
shift 5
began=$(date +%s.%N)
if ! own; then
  say "$root is not a folder of yours alone; the environment is not staged"
elif unpack "$env" "$folder/$env.$suffix" && { [[ $code == - ]] || unpack "$code" "$folder/$code.tar"; }; then
  staged=$root/$env/venv/bin/python
  [[ -e $staged ]] || staged=$root/$env/base/bin/python
  # Not the folder that the job was submitted in first, as -m has it: it may hold the code on the shared disk.
  export FORGE_HPC_SHARED_PYTHON=$python PYTHONSAFEPATH=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
  [[ $code == - ]] || PYTHONPATH=$root/$code:$PYTHONPATH
  if [[ -n $(compgen -G "$root/$env/base/libpython/*") ]]; then
    # (a Python that is a shared library would look for it where it was installed)
    export LD_LIBRARY_PATH=$root/$env/base/libpython${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  fi
  if "$staged" -c 'import forge_hpc' 2> /dev/null; then
    echo "$(uname -n): environment from $root/$env, $(awk "BEGIN { printf \"%.1f\", $(date +%s.%N) - $began }") s"
    exec "$staged" "$@"
  fi
  say "$staged does not run; the environment is not staged"
  unset FORGE_HPC_SHARED_PYTHON PYTHONSAFEPATH
else
  say "the environment is not staged"
fi
exec "$python" "$@"
