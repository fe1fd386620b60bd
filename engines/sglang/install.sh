#!/usr/bin/env bash
# Make a Python environment that runs SGLang servers:
#
#   engines/sglang/install.sh [FOLDER=.venv-sglang] [VERSION=0.5.23]
#
# With an NVIDIA GPU, or where SGLANG_GPU is set (an image is built where there is none): `pip install sglang==VERSION`,
# nothing else.
# Without one: the exact set of requirements/sglang-VERSION.txt (SGLang's own metadata asks for CUDA packages), and two
# things that make its CPU engine start from PyPI wheels: a stand-in for the compiled kernels (cpu_standin/sgl_kernel)
# and two operator declarations at the top of torchvision, whose compiled half cannot load beside a CPU torch.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-.venv-sglang}"
version="${2:-0.5.23}"
requirements="$here/../../requirements/sglang-$version.txt"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
if [ -n "${SGLANG_GPU:-}" ] || nvidia-smi -L >/dev/null 2>&1; then
  pip install "sglang==$version"
  exit 0
fi
if [ ! -f "$requirements" ]; then
  echo "SGLang $version has no tested CPU set; there are: $(cd "$here/../../requirements" && echo sglang-*.txt)" >&2
  exit 2
fi
pip install "$(grep '^torch==' "$requirements")"  # with its dependencies, whichever build the index has
pip install --no-deps -r "$requirements"
"$folder/bin/python" - "$here/cpu_standin" <<'PYTHON'
import shutil
import site
import sys
from pathlib import Path

import torch

MARK = "# declared by engines/sglang/install.sh: the compiled half needs CUDA"
packages = Path(site.getsitepackages()[0])
shutil.copytree(Path(sys.argv[1]) / "sgl_kernel", packages / "sgl_kernel", dirs_exist_ok=True)
torchvision = packages / "torchvision" / "__init__.py"
source = torchvision.read_text()
if torch.version.cuda is None and MARK not in source:
    declarations = [
        f"import torch as _torch  {MARK}",
        '_declared = _torch.library.Library("torchvision", "DEF")',
        '_declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")',
        '_declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")',
    ]
    torchvision.write_text("\n".join(declarations) + "\n" + source)
PYTHON
