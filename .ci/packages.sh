#!/usr/bin/env bash
# System packages that some tests need: a real SLURM cluster, network namespaces, a browser. Installs what is missing
# when it may; otherwise says what is missing, and the tests that need it are skipped with a sentence.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

declare -A package=([slurmctld]=slurm-wlm [slurmd]=slurm-wlm [munged]=munge [ip]=iproute2 [chromium]=chromium)
missing=()
for program in "${!package[@]}"; do
  if ! command -v "$program" >/dev/null; then missing+=("${package[$program]}"); fi
done
if ((${#missing[@]} == 0)); then
  echo "packages: slurm-wlm, munge, iproute2 and chromium are there"
  exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "packages: missing ${missing[*]}; as root: apt-get install ${missing[*]} (their tests are skipped)"
  exit 0
fi
echo "packages: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --yes --no-install-recommends "${missing[@]}" >/tmp/ldm-packages.log 2>&1; }
if ! install && ! { apt-get update >/dev/null 2>&1 && install; }; then
  tail -n 5 /tmp/ldm-packages.log
  echo "packages: could not install ${missing[*]}; their tests are skipped"
fi
