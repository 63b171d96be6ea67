#!/usr/bin/env bash
# Install medlit from this folder, without a network:
#
#   bash install.sh [FOLDER]
#
# makes FOLDER/.venv and FOLDER/configs (default: the current folder) and copies the bundle's base models and data sets
# into the Hugging Face cache. PYTHON=/path/to/python chooses the Python. It can be run again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:-$PWD}

say() { echo "medlit: $*"; }
fail() { say "$*" >&2; exit 2; }

say "checking the sums"
(cd "$here" && sha256sum --check --quiet --strict SHA256SUMS >&2) ||
  fail "this bundle is damaged: copy it again. Nothing was installed."

# shellcheck source=/dev/null
source "$here/bundle.env"
[ "$(uname -s)-$(uname -m)" = "Linux-$BUNDLE_MACHINE" ] ||
  fail "this bundle is for Linux on $BUNDLE_MACHINE, but this is $(uname -s) on $(uname -m): make another one."
python=""
for candidate in "${PYTHON:-python$BUNDLE_PYTHON}" python3 python; do
  if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$BUNDLE_PYTHON')" 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "this bundle is for Python $BUNDLE_PYTHON, which is not installed here: set PYTHON=/path/to/python$BUNDLE_PYTHON."

say "installing into $target/.venv with $("$python" --version)"
mkdir -p "$target"
"$python" -m venv "$target/.venv" || fail "$python cannot make virtual environments: install its venv package."
# Ignore this machine's pip settings, above all its index.
for name in $(compgen -e PIP_ || true); do unset "$name"; done
export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1
install=("$target/.venv/bin/python" -m pip install --no-index --find-links "$here/wheels")
mapfile -t torch < <(grep -E '^torch(vision)?==' "$here/requirements/$BUNDLE_BUILD.txt")
"${install[@]}" --constraint "$here/requirements/base.txt" "${torch[@]}"
"${install[@]}" --requirement "$here/requirements/serve.txt" --no-deps --requirement "$here/requirements/$BUNDLE_BUILD.txt"
"${install[@]}" --no-deps --force-reinstall "$here"/wheels/medlit-*.whl

[ -e "$target/configs" ] || cp -r "$here/configs" "$target/configs"
cache=${HF_HOME:-$HOME/.cache/huggingface}
for kind in hub datasets; do
  if [ -d "$here/$kind" ]; then
    to=$cache/$kind
    [ "$kind" = hub ] && to=${HF_HUB_CACHE:-$to} || to=${HF_DATASETS_CACHE:-$to}
    say "copying $(ls "$here/$kind" | tr '\n' ' ')to $to"
    mkdir -p "$to"
    tar -C "$here/$kind" -cf - . | tar -C "$to" --skip-old-files -xf -
  fi
done

say "installed; medlit doctor checks this machine"
HF_HUB_OFFLINE=1 "$target/.venv/bin/medlit" doctor
say "without a network: export HF_HUB_OFFLINE=1; then: source $target/.venv/bin/activate && medlit fit --config configs/quickstart.yaml"
