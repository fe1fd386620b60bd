#!/usr/bin/env bash
# Programs that tests run beside Python: Prometheus and its promtool (dashboards/), and a Chromium (the page of responses);
# with the word `cluster` those of tests/cluster in their place: Slurm's daemons and commands, and munge.
# Installs with apt what is missing, as root; says what to install otherwise.
set -euo pipefail
missing=()
have() { command -v "$1" >/dev/null 2>&1; }
if [ "${1:-}" = cluster ]; then
	for package in slurmctld slurmd munge:munged slurm-client:srun; do
		have "${package#*:}" || missing+=("${package%:*}")
	done
else
	have prometheus && have promtool || missing+=(prometheus)
	have chromium || have chromium-browser || have google-chrome || missing+=(chromium)
fi
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" = 0 ]; then as_root=(env); elif sudo -n true 2>/dev/null; then as_root=(sudo -n); else
	echo "tests need: ${missing[*]}; as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
"${as_root[@]}" apt-get update -qq
# what runs is started by tests alone, never as a service of the machine
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"
