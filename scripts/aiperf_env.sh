#!/usr/bin/env bash
# Makes a virtual environment with NVIDIA AIPerf, for `tuner bench --with aiperf` and tests/cluster/load/test_load_aiperf.py.
#
#   scripts/aiperf_env.sh [FOLDER]      default: .venv-aiperf (some 1.2 GB; a few minutes)
#
# It is kept apart from the tool's environment, which never imports it. The version is pinned: the adapter reads its files.
# Variable: PYTHON (3.11 or newer).
set -euo pipefail

AIPERF=0.13.0
FOLDER=${1:-.venv-aiperf}
PYTHON=${PYTHON:-python3}
STAMP="$FOLDER/.aiperf-$AIPERF"

if [[ -e $STAMP ]]; then
  echo "$FOLDER holds AIPerf $AIPERF already"
  exit 0
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$PYTHON is too old: AIPerf $AIPERF needs Python 3.11 or newer; name another: PYTHON=/path/to/python3.11 $0" >&2
  exit 2
}
[[ -x $FOLDER/bin/python ]] || "$PYTHON" -m venv "$FOLDER"
"$FOLDER/bin/python" -m pip --disable-pip-version-check --no-input -q install "aiperf==$AIPERF"
touch "$STAMP"
echo "$FOLDER/bin/aiperf is AIPerf $AIPERF"
