#!/bin/bash
# Installs heretic-kl on a node without network, from a folder of wheels that was made on one with:
#
#   pip wheel --wheel-dir wheelhouse '.[postgresql,grpc]'
#
#   slurm/setup-node.sh [WHEELHOUSE [ENVIRONMENT]]
set -eu
wheels=${1:-wheelhouse}
environment=${2:-$HOME/heretic-kl-env}
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --no-index --find-links "$wheels" heretic-kl
"$environment/bin/heretic-kl" --version
echo "export PATH=$environment/bin:\$PATH"
