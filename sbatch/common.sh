# What the job scripts share. Sourced by them, with `project` set to the project's directory.

# run_recipe RECIPE [ARGUMENTS...]: make the run directory, then start the run on every node.
run_recipe() {
  umask 077
  local python=$project/.venv/bin/python command
  [[ -x $python ]] || python=$(command -v python3) # an environment that was active when sbatch was called
  if ! (cd "$project" && "$python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("omegaconf") is None)'); then
    echo "error: $project/.venv is not there, and ${python:-python3} has no forge_hpc environment" >&2
    echo "hint: run \`make setup\` in $project, or activate an environment before sbatch" >&2
    exit 2
  fi
  export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} # also where the project is not installed
  command=$("$python" -m forge_hpc.cli prepare --recipe "$@") || exit
  unset FORGE_HPC_CONTINUE FORGE_HPC_PROJECT # meant for this job alone, not for what it may submit
  eval "$command"
}
